"""Grouped matmul in portable XLA: a loop over the valid blocks."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.api import Matrices
from kernels_pallas.token_tiles import Blocks, choose_block_rows

# Products of fewer rows are no cheaper.
_MIN_ROWS = 8
_MAX_ROWS = 128


class XlaGroupedMatmul:
    """A `GroupedMatmul`."""

    def block_rows(self, num_rows: int, num_groups: int, row_bytes: int) -> int:
        """See `GroupedMatmul`."""
        del row_bytes
        return choose_block_rows(num_rows, num_groups, min_rows=_MIN_ROWS, max_rows=_MAX_ROWS)

    def __call__(self, x_PI: jax.Array, matrices: Matrices, blocks: Blocks, *, transposed: bool = False) -> jax.Array:
        """See `GroupedMatmul`; blocks that are not valid are zeros."""
        num_block_rows, num_inputs = x_PI.shape
        block_rows = num_block_rows // blocks.group_C.shape[0]
        equation, out_axis = ("wi,io->wo", 2) if transposed else ("wi,oi->wo", 1)

        def multiply(block: jax.Array, y_PO: jax.Array) -> jax.Array:
            x_WI = lax.dynamic_slice(x_PI, (block * block_rows, 0), (block_rows, num_inputs))
            y_WO = jnp.einsum(equation, x_WI, matrices.matrix(blocks.group_C[block], x_PI.dtype))
            return lax.dynamic_update_slice(y_PO, y_WO, (block * block_rows, 0))

        y_PO = jnp.zeros((num_block_rows, matrices.values_XOI.shape[out_axis]), x_PI.dtype)
        return lax.fori_loop(0, blocks.num_live_1[0], multiply, y_PO)
