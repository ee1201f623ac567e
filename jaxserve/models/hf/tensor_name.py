"""Locations of weights in a checkpoint."""

from typing import NamedTuple

_EXPERT = "{expert}"


class TensorName(NamedTuple):
    """A tensor of a checkpoint, or some of its rows.

    Weights of experts [E, out, in] are stored as one tensor per expert, or as one tensor with experts as leading axis.

    Attributes:
        pattern: name of the tensor, with `{layer}` for the layer's index and `{expert}` for the expert's.
        first_row: first row of the weight in a tensor that stacks several weights.
        row_step: distance between rows of the weight in a tensor that interleaves several weights.
        transposed: the tensor is [in, out]; its columns are the weight's rows.
    """

    pattern: str
    first_row: int = 0
    row_step: int = 1
    transposed: bool = False

    @property
    def by_expert(self) -> bool:
        """Whether each expert has its own tensor."""
        return _EXPERT in self.pattern

    def of_layer(self, layer: int, expert: int = 0) -> str:
        """Return the tensor's name for a layer and, where `by_expert`, an expert."""
        return self.pattern.format(layer=layer, expert=expert)
