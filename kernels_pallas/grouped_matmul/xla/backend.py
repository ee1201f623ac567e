"""Grouped matmul in portable XLA: a loop over the used blocks."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from kernels_pallas.grouped_matmul.api import Matrices, take_rows
from kernels_pallas.quantized import QuantizedFormat, QuantizedRows
from kernels_pallas.token_tiles import Blocks, choose_block_rows

# Products of fewer rows are no cheaper.
_MIN_ROWS = 8
_MAX_ROWS = 128


class XlaGroupedMatmul:
    """A `GroupedMatmul`."""

    max_dense_rows = 0
    max_compared = 0
    adds_bias = False

    def takes_quantized_rows(self, format: QuantizedFormat, num_inputs: int) -> bool:
        """See `GroupedMatmul`."""
        del format, num_inputs
        return False

    def block_rows(self, num_rows: int, num_groups: int, row_bytes: int) -> int:
        """See `GroupedMatmul`."""
        del row_bytes
        return choose_block_rows(num_rows, num_groups, min_rows=_MIN_ROWS, max_rows=_MAX_ROWS)

    def __call__(
        self,
        x: jax.Array | QuantizedRows,
        matrices: Sequence[Matrices],
        blocks: Blocks,
        *,
        row_P: jax.Array | None = None,
        transposed: bool = False,
        out_dtype: DTypeLike | None = None,
    ) -> list[jax.Array]:
        """See `GroupedMatmul`; blocks that are not used are zeros."""
        x_PI = take_rows(x, row_P)
        if isinstance(x_PI, QuantizedRows):
            raise NotImplementedError("the kernel does not multiply rows that are quantised")
        num_block_rows, num_inputs = x_PI.shape
        block_rows = num_block_rows // blocks.group_C.shape[0]
        equation, out_axis = ("wi,io->wo", 2) if transposed else ("wi,oi->wo", 1)

        def multiply(block: jax.Array, y_PO: jax.Array, of_groups: Matrices) -> jax.Array:
            x_WI = lax.dynamic_slice(x_PI, (block * block_rows, 0), (block_rows, num_inputs))
            w = of_groups.matrix(blocks.group_C[block], x_PI.dtype)
            y_WO = jnp.einsum(equation, x_WI, w, preferred_element_type=out_dtype)
            return lax.dynamic_update_slice(y_PO, y_WO, (block * block_rows, 0))

        results: list[jax.Array] = []
        for each in matrices:
            zeros_PO = jnp.zeros((num_block_rows, each.values_XOI.shape[out_axis]), out_dtype or x_PI.dtype)
            results.append(lax.fori_loop(0, blocks.num_live, partial(multiply, of_groups=each), zeros_PO))
        return results
