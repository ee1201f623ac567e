"""Where a checkpoint has a weight."""

from typing import NamedTuple


class TensorName(NamedTuple):
    """A tensor of a checkpoint, or some of its rows.

    Attributes:
        pattern: its name; `{layer}` stands for the layer's number.
        first_row: of the weight, in a tensor that has several one below the other.
    """

    pattern: str
    first_row: int = 0

    def of_layer(self, layer: int) -> str:
        """The name in one layer."""
        return self.pattern.format(layer=layer)
