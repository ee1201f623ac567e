"""Grouped matmul on Hopper GPUs: a kernel over blocks of 64 rows, each multiplied by its group's matrix.

Dimension key: C blocks, P rows of all blocks, m rows of a block (64), X matrices, I inputs, i a step of them, O
outputs, o a block of them. A column of a 4-bit matrix is one byte, that is two inputs, and each block of rows is split
into two: the inputs of the lower halves of the bytes, followed by the inputs of the upper halves.
"""

from functools import partial
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.api import ExpertShape, Matrices
from kernels_pallas.grouped_matmul.gpu.products import (
    BLOCK_INPUTS,
    Operands,
    Scratch,
    SumUp,
    sum_up,
    sum_up_blocks,
    sum_up_groups,
    sum_up_rows,
)
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.quantized import QuantizedFormat
from kernels_pallas.token_tiles import Blocks
from kernels_pallas.warpgroup import WARPGROUP_ROWS, Stages, smem

# Inputs per step: a row of either operand is then 128 bytes, the span of one swizzle. Smaller steps are for
# LoRA matrices.
_STEP_INPUTS = 64
_STEPS_INPUTS = (_STEP_INPUTS, 32, 16)
# Bytes per step of 4-bit matrices; the largest that divides a row is used: rows of gpt-oss have 1,440.
_STEPS_BYTES = (64, 48, 32, 16)
_STAGES = 4
_BLOCK_OUTPUTS = (128, 64, 32, 16)
# Quantised matrices are converted this many rows at a time.
_QUANTIZED_OUTPUTS = 64
# A scale covers a 128 x 128 block (two steps of one block of outputs) or a whole row.
_IN_BLOCKS = QuantizedFormat("fp8", (BLOCK_INPUTS, BLOCK_INPUTS))
_BY_ROW = (QuantizedFormat("fp8", (1, 0)), QuantizedFormat("int8", (1, 0)))


def check_shape(shape: ExpertShape) -> None:
    """Raise NotImplementedError for matrices that the kernel cannot multiply."""
    num_outputs, num_inputs, dtype, format = shape[:4]
    if dtype != jnp.bfloat16:
        raise NotImplementedError(f"matrices in {dtype}: the kernel supports only bfloat16")
    inputs, outputs = _multiples(format)
    if num_inputs % inputs or num_outputs % outputs:
        raise NotImplementedError(
            f"matrices of {num_inputs} inputs and {num_outputs} outputs on a device: the kernel needs multiples of "
            f"{inputs} and {outputs}"
        )


def _multiples(format: QuantizedFormat | None) -> tuple[int, int]:
    """Return the numbers that must divide the inputs and outputs of a matrix."""
    if format is None:
        return _STEPS_INPUTS[-1], _BLOCK_OUTPUTS[-1]
    if format == _IN_BLOCKS:
        return format.block
    if format in _BY_ROW:
        return _STEP_INPUTS, _QUANTIZED_OUTPUTS
    rows, columns = format.block
    if format.per_byte == 2 and rows == 1 and columns % (2 * _STEPS_BYTES[-1]) == 0:
        return 2 * _STEPS_BYTES[-1], _QUANTIZED_OUTPUTS
    raise NotImplementedError(
        f"matrices in {format.element_type} and blocks of {format.block}: the kernel wants {_IN_BLOCKS.element_type} "
        f"in {_IN_BLOCKS.block}, 8 bits with a scale per row, or 4 bits with a scale per {2 * _STEPS_BYTES[-1]} "
        "elements or a multiple of them"
    )


class _Tiling(NamedTuple):
    """The tiling of a product.

    Attributes:
        columns: columns per step.
        outputs: outputs per block.
        swizzled: columns that the swizzle of both operands spans, if less than a row; else None.
        sum_up: function that sums up the steps.
    """

    columns: int
    outputs: int
    swizzled: int | None
    sum_up: SumUp


def _tiling(matrices: Matrices, *, transposed: bool) -> _Tiling:
    w_XOI, format = matrices.values_XOI, matrices.format
    num_outputs, num_columns = w_XOI.shape[:0:-1] if transposed else w_XOI.shape[1:]
    if format is not None and format.per_byte == 2:
        columns = next(size for size in _STEPS_BYTES if num_columns % size == 0)
        piece = gcd(columns, format.block[1] // 2)
        return _Tiling(columns, _QUANTIZED_OUTPUTS, piece, partial(sum_up_groups, format=format, piece=piece))
    outputs = next(size for size in _BLOCK_OUTPUTS if num_outputs % size == 0)
    max_columns = outputs if transposed else _STEP_INPUTS  # a row of the matrix must span the swizzle of x
    columns = next(size for size in _STEPS_INPUTS if num_columns % size == 0 and size <= max_columns)
    if format is not None:
        return _Tiling(columns, outputs, None, sum_up_rows if format in _BY_ROW else sum_up_blocks)
    return _Tiling(columns, outputs, columns if transposed else None, partial(sum_up, transposed=transposed))


class GpuGroupedMatmul:
    """A `GroupedMatmul`.

    Args:
        interpret: parameters of the GPU interpret mode, or False to compile.
    """

    def __init__(self, interpret: Any = False) -> None:
        self._interpret = interpret

    def block_rows(self, num_rows: int, num_groups: int, row_bytes: int) -> int:
        """See `GroupedMatmul`; always the number of rows that a warpgroup multiplies."""
        del num_rows, num_groups, row_bytes
        return WARPGROUP_ROWS

    def __call__(self, x_PI: jax.Array, matrices: Matrices, blocks: Blocks, *, transposed: bool = False) -> jax.Array:
        """See `GroupedMatmul`."""
        operands = _operands(x_PI, matrices, blocks)
        tiling = _tiling(matrices, transposed=transposed)
        num_blocks, num_rows, num_columns = operands.x_CmI.shape
        num_outputs = operands.w.shape[2 if transposed else 1]
        block = (tiling.columns, tiling.outputs) if transposed else (tiling.outputs, tiling.columns)
        converted = (num_rows // WARPGROUP_ROWS * tiling.outputs, tiling.columns)
        kernel = plgpu.kernel(
            partial(
                _multiply_block, num_steps=num_columns // tiling.columns, sum_up=tiling.sum_up, transposed=transposed
            ),
            out_type=jax.ShapeDtypeStruct((num_blocks, WARPGROUP_ROWS, num_outputs), x_PI.dtype),
            scratch_types=[
                Scratch(
                    x_mi=smem((_STAGES, num_rows, tiling.columns), x_PI.dtype, like=tiling.swizzled),
                    w=smem((_STAGES, *block), operands.w.dtype, like=tiling.swizzled),
                    arrived=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
                    out_mo=smem((WARPGROUP_ROWS, tiling.outputs), x_PI.dtype),
                    converted_oi=None if matrices.format is None else smem(converted, x_PI.dtype, like=tiling.swizzled),
                )
            ],
            grid=(num_outputs // tiling.outputs, num_blocks),
            grid_names=("outputs", "block"),
            kernel_name="grouped_matmul",
            interpret=self._interpret,
        )
        return kernel(operands).reshape(-1, num_outputs)


def _operands(x_PI: jax.Array, matrices: Matrices, blocks: Blocks) -> Operands:
    scale, format = matrices.scale_Xoi, matrices.format
    if format in _BY_ROW and scale is not None:
        scale = scale[:, :, 0]
    x_CmI = x_PI.reshape(-1, WARPGROUP_ROWS, x_PI.shape[1])
    if format is not None and format.per_byte == 2:
        # Rows are split instead of bytes: the inputs of the lower halves of the bytes, then those of the upper halves.
        x_CmI = jnp.concatenate([x_CmI[:, :, half::2] for half in range(2)], axis=1)
    return Operands(blocks, x_CmI, matrices.values_XOI, scale, matrices.zero_Xoi)


def _multiply_block(
    operands: Operands, out_CmO: Any, scratch: Scratch, *, num_steps: int, sum_up: SumUp, transposed: bool
) -> None:
    block, block_outputs, step_columns = lax.axis_index("block"), scratch.out_mo.shape[1], scratch.x_mi.shape[2]

    @pl.when(block < operands.blocks.num_live_1[0])
    def _multiply() -> None:
        group = operands.blocks.group_C[block]
        outputs = pl.ds(lax.axis_index("outputs") * block_outputs, block_outputs)

        def copy(step: jax.Array, stage: jax.Array) -> None:
            columns, arrived = pl.ds(step * step_columns, step_columns), scratch.arrived.at[stage]
            part = (columns, outputs) if transposed else (outputs, columns)
            plgpu.copy_gmem_to_smem(operands.x_CmI.at[block, :, columns], scratch.x_mi.at[stage], arrived)
            plgpu.copy_gmem_to_smem(operands.w.at[group, *part], scratch.w.at[stage], arrived)

        stages = Stages(num_steps, copy, scratch.arrived)
        stages.start()

        sum_mo = sum_up(operands, scratch, stages, group)
        scratch.out_mo[...] = sum_mo.astype(scratch.out_mo.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.out_mo, out_CmO.at[block, :, outputs])
        plgpu.wait_smem_to_gmem(0)
