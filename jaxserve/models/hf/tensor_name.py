"""Where a checkpoint has a weight."""

from typing import NamedTuple

_EXPERT = "{expert}"


class TensorName(NamedTuple):
    """A tensor of a checkpoint, or some of its rows.

    Weights of experts [E, out, in] are a tensor for each of them, or one that has them along its leading axis.

    Attributes:
        pattern: its name; `{layer}` stands for the layer's number, `{expert}` for the expert's.
        first_row: first row of the weight in a tensor that stacks several weights.
        row_step: from one row of the weight to the next, where the rows of several take turns.
        transposed: the tensor is [in, out]; its columns are the weight's rows.
    """

    pattern: str
    first_row: int = 0
    row_step: int = 1
    transposed: bool = False

    @property
    def by_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return _EXPERT in self.pattern

    def of_layer(self, layer: int, expert: int = 0) -> str:
        """The name in one layer, and of one of its experts."""
        return self.pattern.format(layer=layer, expert=expert)
