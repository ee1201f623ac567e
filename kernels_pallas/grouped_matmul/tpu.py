"""Grouped products on TPU: a kernel over blocks of rows, which fetches each block's matrix.

Blocks of one group follow each other, so a matrix that several have is fetched once.

Dimension key: C blocks, P places, W rows of a block, X matrices, I inputs, O outputs, o a block of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.api import ExpertShape, Matrices
from kernels_pallas.grouped_matmul.blocks import Blocks, rows_of_blocks
from kernels_pallas.mxu import mxu_dot
from kernels_pallas.pallas import pl, pltpu

_LANES = 128
# A tile of bf16 has 16 rows; more than the matrix unit has rows gain nothing.
_FEWEST_ROWS = 16
_MOST_ROWS = 128
# Of a matrix's block: there are two of them, beside two of the rows and of the results.
_BLOCK_BYTES = 4 << 20
# Of sums, and of f32 operands in parts: more than all blocks where those are f32.
_SPARE_BYTES = 16 << 20


def check_shape(shape: ExpertShape) -> None:
    """Raise NotImplementedError for matrices that the kernel cannot multiply."""
    if shape.rows_dtype == jnp.float16:
        raise NotImplementedError("the TPU kernel has no float16: the MXU has none")
    if shape.form is None:
        return
    if shape.form.numbers != "fp8":
        raise NotImplementedError(f"experts in {shape.form.numbers}: the kernel multiplies float8_e4m3fn")
    if shape.form.block != (_LANES, _LANES) or shape.num_outputs % _LANES or shape.num_inputs % _LANES:
        raise NotImplementedError(
            f"experts of {shape.num_inputs} inputs and {shape.num_outputs} outputs on a device, quantised in blocks of "
            f"{shape.form.block}: the kernel wants multiples of {_LANES}, and blocks of that"
        )


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

    def __call__(self, x_PI: jax.Array, matrices: Matrices, blocks: Blocks) -> jax.Array:
        """See `GroupedMatmul`."""
        w_XOI, scale_Xoi = matrices.values_XOI, matrices.scale_Xoi
        (num_places, num_inputs), num_outputs = x_PI.shape, w_XOI.shape[1]
        block_rows = num_places // blocks.group_C.shape[0]
        block_outputs = _block_outputs(num_outputs, num_inputs * w_XOI.dtype.itemsize)
        operands = [x_PI, w_XOI]
        in_specs = [
            pl.BlockSpec((block_rows, num_inputs), lambda o, c, _: (c, 0)),
            pl.BlockSpec((1, block_outputs, num_inputs), lambda o, c, group_C: (group_C[c], o, 0)),
        ]
        if scale_Xoi is not None:
            operands.append(scale_Xoi)
            in_specs.append(
                pl.BlockSpec(
                    (1, *scale_Xoi.shape[1:]), lambda o, c, group_C: (group_C[c], 0, 0), memory_space=pltpu.SMEM
                )
            )
        return pl.pallas_call(
            _multiply_block if scale_Xoi is None else _multiply_scaled_block,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                # A device may have none that counts.
                grid=(pl.cdiv(num_outputs, block_outputs), jnp.maximum(blocks.num_1[0], 1)),
                in_specs=in_specs,
                out_specs=pl.BlockSpec((block_rows, block_outputs), lambda o, c, _: (c, o)),
            ),
            out_shape=jax.ShapeDtypeStruct((num_places, num_outputs), x_PI.dtype),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=_vmem_bytes(block_rows, block_outputs, x_PI, w_XOI),
            ),
            interpret=self._interpret,
            name="grouped_matmul",
        )(blocks.group_C, *operands)


def _multiply_block(_: Any, x_WI: Any, w_1oI: Any, out_Wo: Any) -> None:
    out_Wo[...] = mxu_dot(x_WI[...], w_1oI[0], contract=1).astype(out_Wo.dtype)


def _multiply_scaled_block(_: Any, x_WI: Any, w_1oI: Any, scale_1oi: Any, out_Wo: Any) -> None:
    """As `_multiply_block`, one block of columns after the other: their results are scaled, not the matrix."""
    num_rows = out_Wo.shape[1] // _LANES
    first_row, last_row = pl.program_id(0) * num_rows, scale_1oi.shape[1] - 1

    def multiply(column: jax.Array, sum_Wo: jax.Array) -> jax.Array:
        columns = pl.ds(pl.multiple_of(column * _LANES, _LANES), _LANES)
        part_Wo = mxu_dot(x_WI[:, columns], w_1oI[0, :, columns].astype(x_WI.dtype), contract=1)
        # The last block of outputs may be cut.
        scales = [scale_1oi[0, jnp.minimum(first_row + row, last_row), column] for row in range(num_rows)]
        scale_1o = jnp.concatenate([jnp.full((1, _LANES), scale, jnp.float32) for scale in scales], axis=1)
        return sum_Wo + part_Wo * scale_1o

    num_columns = x_WI.shape[1] // _LANES
    out_Wo[...] = lax.fori_loop(0, num_columns, multiply, jnp.zeros(out_Wo.shape, jnp.float32)).astype(out_Wo.dtype)


def _vmem_bytes(block_rows: int, block_outputs: int, x_PI: jax.Array, w_XOI: jax.Array) -> int:
    """Two blocks of all operands and of the results, and what the products need beside them."""
    num_inputs = x_PI.shape[1]
    rows = block_rows * (num_inputs + block_outputs) * x_PI.dtype.itemsize
    return 2 * (rows + block_outputs * num_inputs * w_XOI.dtype.itemsize) + _SPARE_BYTES


def _block_outputs(num_outputs: int, row_bytes: int) -> int:
    return min(num_outputs, max(_LANES, _BLOCK_BYTES // row_bytes // _LANES * _LANES))
