"""Products of rows with a matrix of their own group: experts, each with a few of the tokens.

Matrices stay in the stack of all layers: a layer's are found by an offset, as its pages are in a cache. Cut out of the
stack they would be copied, and with them those that no token has.

Dimension key: C blocks, P places of rows in blocks, X matrices, I inputs, O outputs.
"""

from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
from jax.typing import DTypeLike

from kernels_pallas.block_scales import dequantize_blocks
from kernels_pallas.grouped_matmul.blocks import Blocks


class ExpertShape(NamedTuple):
    """Of the matrices that one device multiplies with; see `Matrices`."""

    num_outputs: int
    num_inputs: int
    rows_dtype: Any
    block: tuple[int, int] | None = None


class Matrices(NamedTuple):
    """What rows are multiplied with.

    Attributes:
        values_XOI: the matrices.
        scale_Xoi: f32, a factor of each block of quantised ones; else None.
        block: its rows and columns.
    """

    values_XOI: jax.Array
    scale_Xoi: jax.Array | None = None
    block: tuple[int, int] | None = None

    def matrix(self, group: jax.Array, dtype: DTypeLike) -> jax.Array:
        """One of them, [O, I]; what is quantised is multiplied out."""
        w_OI = lax.dynamic_index_in_dim(self.values_XOI, group, keepdims=False)
        if self.scale_Xoi is None or self.block is None:
            return w_OI
        scale_oi = lax.dynamic_index_in_dim(self.scale_Xoi, group, keepdims=False)
        return dequantize_blocks(w_OI, scale_oi, self.block, dtype)


class GroupedMatmul(Protocol):
    """The product of one device."""

    def block_rows(self, num_rows: int, num_groups: int) -> int:
        """Rows of a block that suit so many rows and groups; see `sort_into_blocks`."""
        ...

    def __call__(self, x_PI: jax.Array, matrices: Matrices, blocks: Blocks) -> jax.Array:
        """`x W^T` of each block that counts with its group's matrix.

        Args:
            x_PI: rows in their places.
            matrices: of all groups.
            blocks: what `x_PI` is made of; groups are numbers of matrices.

        Returns:
            [P, O] in x's dtype, sums in f32; blocks that do not count hold anything.
        """
        ...
