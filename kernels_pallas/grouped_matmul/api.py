"""Products of rows with a matrix of their own group: experts, each with a few of the tokens.

Matrices stay in the stack of all layers: a layer's are found by an offset, as its pages are in a cache. Cut out of the
stack they would be copied, and with them those that no token has.

Dimension key: C blocks, P places of rows in blocks, X matrices, I inputs, O outputs.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
from jax.typing import DTypeLike

from kernels_pallas.quantized import QuantizedFormat, QuantizedMatrix, dequantize
from kernels_pallas.token_tiles import Blocks


class ExpertShape(NamedTuple):
    """Sizes of the matrices that one device multiplies with; see `Matrices`.

    Attributes:
        num_outputs, num_inputs: numbers, not bytes.
        rows_dtype: dtype of the rows that are multiplied with the matrices.
        format: format of quantised matrices; None for others.
        zeros: whether those have zero points of their own.
        transposed: they are [I, O].
    """

    num_outputs: int
    num_inputs: int
    rows_dtype: Any
    format: QuantizedFormat | None = None
    zeros: bool = False
    transposed: bool = False


class Matrices(NamedTuple):
    """What rows are multiplied with.

    Attributes:
        values_XOI: the matrices.
        scale_Xoi, zero_Xoi: scales and zero points of quantised matrices, as in `QuantizedMatrix`; None for others.
        format: how they are quantised.
    """

    values_XOI: jax.Array
    scale_Xoi: jax.Array | None = None
    zero_Xoi: jax.Array | None = None
    format: QuantizedFormat | None = None

    def matrix(self, group: jax.Array, dtype: DTypeLike) -> jax.Array:
        """One of them, [O, I]; what is quantised is multiplied out."""
        take = partial(lax.dynamic_index_in_dim, index=group, keepdims=False)
        if self.scale_Xoi is None or self.format is None:
            return take(self.values_XOI)
        zero_oi = None if self.zero_Xoi is None else take(self.zero_Xoi)
        return dequantize(QuantizedMatrix(take(self.values_XOI), take(self.scale_Xoi), zero_oi), self.format, dtype)


class GroupedMatmul(Protocol):
    """The product of one device."""

    def block_rows(self, num_rows: int, num_groups: int, row_bytes: int) -> int:
        """Rows of a block that suit so many rows of so many bytes, and groups; see `sort_into_blocks`."""
        ...

    def __call__(self, x_PI: jax.Array, matrices: Matrices, blocks: Blocks, *, transposed: bool = False) -> jax.Array:
        """`x W^T` of each block that counts with its group's matrix.

        Args:
            x_PI: rows in their places.
            matrices: the matrices of all groups.
            blocks: what `x_PI` is made of; groups are numbers of matrices.
            transposed: matrices are [X, I, O], and not quantised.

        Returns:
            [P, O] in x's dtype, sums in f32; blocks that do not count hold anything.
        """
        ...
