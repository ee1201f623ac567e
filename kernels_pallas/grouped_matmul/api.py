"""Products of rows with a matrix of their own group: experts, each with a few of the tokens.

Matrices stay in the stack of all layers: a layer's are found by an offset, as its pages are in a cache. Cut out of the
stack they would be copied, and with them those that no token has.

Dimension key: C blocks, P places of rows in blocks, X matrices, I inputs, O outputs.
"""

from typing import Any, NamedTuple, Protocol

import jax

from kernels_pallas.grouped_matmul.blocks import Blocks


class ExpertShape(NamedTuple):
    """Of the matrices that one device multiplies with."""

    num_outputs: int
    num_inputs: int
    dtype: Any


class GroupedMatmul(Protocol):
    """The product of one device."""

    def block_rows(self, num_rows: int, num_groups: int) -> int:
        """Rows of a block that suit so many rows and groups; see `sort_into_blocks`."""
        ...

    def __call__(self, x_PI: jax.Array, w_XOI: jax.Array, blocks: Blocks) -> jax.Array:
        """`x W^T` of each block that counts with its group's matrix.

        Args:
            x_PI: rows in their places.
            w_XOI: matrices.
            blocks: what `x_PI` is made of; groups are numbers of matrices.

        Returns:
            [P, O] in x's dtype, sums in f32; blocks that do not count hold anything.
        """
        ...
