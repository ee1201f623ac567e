"""Grouped products on TPU: a kernel over blocks of rows, which fetches each block's matrix.

Blocks of one group follow each other, so a matrix that several have is fetched once.

Dimension key: C blocks, P places, W rows of a block, X matrices, I inputs, O outputs, o a block of them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.blocks import Blocks, rows_of_blocks
from kernels_pallas.mxu import mxu_dot
from kernels_pallas.pallas import pl, pltpu

_LANES = 128
# A tile of bf16 has 16 rows; more than the matrix unit has rows gain nothing.
_FEWEST_ROWS = 16
_MOST_ROWS = 128
# Of a matrix's block: there are two of them, beside two of the rows and of the results.
_BLOCK_BYTES = 4 << 20


class TpuGroupedMatmul:
    """A `GroupedMatmul`.

    Args:
        interpret: parameters of the TPU interpret mode, or False to compile.
    """

    def __init__(self, interpret: Any = False) -> None:
        self._interpret = interpret

    def block_rows(self, num_rows: int, num_groups: int) -> int:
        """See `GroupedMatmul`."""
        return rows_of_blocks(num_rows, num_groups, fewest=_FEWEST_ROWS, most=_MOST_ROWS)

    def __call__(self, x_PI: jax.Array, w_XOI: jax.Array, blocks: Blocks) -> jax.Array:
        """See `GroupedMatmul`."""
        (num_places, num_inputs), num_outputs = x_PI.shape, w_XOI.shape[1]
        block_rows = num_places // blocks.group_C.shape[0]
        block_outputs = _block_outputs(num_outputs, num_inputs * w_XOI.dtype.itemsize)
        return pl.pallas_call(
            _multiply_block,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                # A device may have none that counts.
                grid=(pl.cdiv(num_outputs, block_outputs), jnp.maximum(blocks.num_1[0], 1)),
                in_specs=[
                    pl.BlockSpec((block_rows, num_inputs), lambda o, c, _: (c, 0)),
                    pl.BlockSpec((1, block_outputs, num_inputs), lambda o, c, group_C: (group_C[c], o, 0)),
                ],
                out_specs=pl.BlockSpec((block_rows, block_outputs), lambda o, c, _: (c, o)),
            ),
            out_shape=jax.ShapeDtypeStruct((num_places, num_outputs), x_PI.dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=self._interpret,
            name="grouped_matmul",
        )(blocks.group_C, x_PI, w_XOI)


def _multiply_block(_: Any, x_WI: Any, w_1oI: Any, out_Wo: Any) -> None:
    out_Wo[...] = mxu_dot(x_WI[...], w_1oI[0], contract=1).astype(out_Wo.dtype)


def _block_outputs(num_outputs: int, row_bytes: int) -> int:
    return min(num_outputs, max(_LANES, _BLOCK_BYTES // row_bytes // _LANES * _LANES))
