"""Products of a block of rows and a block of outputs on Hopper GPUs, one function per format of the matrix.

Dimension key as in `gpu/backend.py`; B columns per step of a 4-bit matrix, of which p share a scale.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.quantized import INT4_ZERO, QuantizedFormat, f32_scales, float4
from kernels_pallas.token_tiles import Blocks
from kernels_pallas.warpgroup import MATRIX, WARPGROUP_ROWS, Stages, product

# Inputs, and outputs, that share a scale of a block-quantised matrix.
BLOCK_INPUTS = 128
# Register layout for loading bytes that are converted to 16-bit operands of a product.
_BYTES = plgpu.Layout.WGMMA_UPCAST_2X
# An f32 whose last mantissa bit is worth 1: setting its low bits to a small integer adds that integer.
_F32_BIAS = 2.0**23
_ABOVE_BITS = 0x4B000000


class Operands(NamedTuple):
    """Operands in global memory.

    Attributes:
        x_CmI: rows of the blocks.
        w: matrices, [X, O, I] or, transposed, [X, I, O].
        scale: scales of quantised matrices, [X, o, i] or, with one per row, [X, O]; else None.
        zero: zero points of 4-bit matrices that have them, [X, o, i]; else None.
    """

    blocks: Blocks
    x_CmI: Any
    w: Any
    scale: Any
    zero: Any


class Scratch(NamedTuple):
    """Pipeline stages of both operands, the barriers for their arrival, and the result before it is stored.

    Attributes:
        w: stages of the matrix, [o, i] or, transposed, [i, o].
        converted_oi: a stage of a quantised matrix, converted to the rows' dtype; for 4 bits, the lower halves of the
            bytes followed by the upper halves. None for other matrices.
    """

    x_mi: Any
    w: Any
    arrived: Any
    out_mo: Any
    converted_oi: Any


# Returns the sum of all steps, f32[m, o]; the last argument is the group.
SumUp: TypeAlias = Callable[[Operands, Scratch, Stages, jax.Array], jax.Array]


def sum_up(_: Operands, scratch: Scratch, stages: Stages, __: jax.Array, *, transposed: bool) -> jax.Array:
    """Sum up the products of all steps, f32[m, o]."""

    def multiply(_: jax.Array, stage: jax.Array, sum_mo: Any) -> None:
        w = scratch.w.at[stage]
        plgpu.wgmma(sum_mo, scratch.x_mi.at[stage], w if transposed else w.T)

    return _accumulate(scratch, stages, multiply)


def sum_up_blocks(operands: Operands, scratch: Scratch, stages: Stages, group: jax.Array) -> jax.Array:
    """Like `sum_up`, for block-quantised matrices: the result of each step is scaled."""
    shape, row = scratch.out_mo.shape, lax.axis_index("outputs")

    def scaled(step: jax.Array, part_mo: jax.Array) -> jax.Array:
        scale = operands.scale[group, row, lax.div(step, BLOCK_INPUTS // scratch.w.shape[2])]
        return part_mo * plgpu.layout_cast(lax.broadcast_in_dim(scale, shape, ()), MATRIX)

    return _sum_up_converted(scratch, stages, scaled)


def sum_up_rows(operands: Operands, scratch: Scratch, stages: Stages, group: jax.Array) -> jax.Array:
    """Like `sum_up`, for matrices with a scale per row: the sum is scaled."""
    sum_mo = _sum_up_converted(scratch, stages, lambda _, part_mo: part_mo)
    shape = scratch.out_mo.shape
    outputs = pl.ds(lax.axis_index("outputs") * shape[1], shape[1])
    scale_o = plgpu.load(operands.scale.at[group, outputs], layout=MATRIX.reduce(0), optimized=False)
    return sum_mo * lax.broadcast_in_dim(scale_o.astype(jnp.float32), shape, [1])


def _sum_up_converted(
    scratch: Scratch, stages: Stages, scaled: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Sum up the products of all steps: each step is converted, multiplied and then scaled."""
    shape = scratch.out_mo.shape

    def multiply(step: jax.Array, sum_mo: jax.Array) -> jax.Array:
        stage = stages.next(step)
        for start in range(0, shape[1], WARPGROUP_ROWS):
            rows = slice(start, start + WARPGROUP_ROWS)
            source = scratch.w.at[stage, rows]
            w_oi = plgpu.load(source, layout=_BYTES, optimized=False)
            if jnp.issubdtype(w_oi.dtype, jnp.floating):
                # Hopper cannot convert fp8 to bf16 in one instruction; both conversions are exact.
                w_oi = w_oi.astype(jnp.float32)
            scratch.converted_oi.at[rows][...] = plgpu.layout_cast(w_oi.astype(scratch.converted_oi.dtype), MATRIX)
        plgpu.commit_smem()
        return sum_mo + scaled(step, product(scratch.x_mi.at[stage], scratch.converted_oi.T, shape[1]))

    zeros_mo = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)
    return lax.fori_loop(0, stages.num_steps, multiply, zeros_mo)


def sum_up_groups(
    operands: Operands, scratch: Scratch, stages: Stages, group: jax.Array, *, format: QuantizedFormat, piece: int
) -> jax.Array:
    """Like `sum_up`, for 4-bit matrices with a scale per group of a row: dequantised one step at a time.

    A `piece` is the number of columns that share a scale and are adjacent in shared memory.
    """
    shape, num_columns = scratch.out_mo.shape, scratch.w.shape[2]
    columns_of_scale = format.block[1] // format.per_byte
    first_output = lax.axis_index("outputs") * shape[1]

    def of_rows(element_type: Any, row: int, column: jax.Array) -> jax.Array:
        """Broadcast the scale or zero point of each row over the columns of a piece, [64, p]."""
        at = 0 if columns_of_scale == 0 else lax.div(column, columns_of_scale)
        rows = pl.ds(first_output + row, WARPGROUP_ROWS)
        of_row = plgpu.load(element_type.at[group, rows, at], layout=_BYTES.reduce(1), optimized=False)
        return lax.broadcast_in_dim(of_row, (WARPGROUP_ROWS, piece), [0])

    def convert(step: jax.Array, stage: jax.Array, row: int, start: int) -> None:
        rows, columns = slice(row, row + WARPGROUP_ROWS), slice(start, start + piece)
        byte_op = plgpu.load(scratch.w.at[stage, rows, columns], layout=_BYTES, optimized=False).astype(jnp.int32)
        column = step * num_columns + start
        scale_op = f32_scales(of_rows(operands.scale, row, column))
        zero_op: Any = _F32_BIAS + INT4_ZERO
        if operands.zero is not None:
            zero_op = _biased_f32(of_rows(operands.zero, row, column).astype(jnp.int32))
        for half in range(format.per_byte):
            code_op = (byte_op >> (4 * half)) & 15
            w_op = float4(code_op) if format.element_type == "mxfp4" else _biased_f32(code_op) - zero_op
            w_op = (w_op * scale_op).astype(scratch.converted_oi.dtype)
            place = slice(half * shape[1] + row, half * shape[1] + row + WARPGROUP_ROWS)
            scratch.converted_oi.at[place, columns][...] = plgpu.layout_cast(w_op, MATRIX)

    def multiply(step: jax.Array, stage: jax.Array, sum_mo: Any) -> None:
        for row in range(0, shape[1], WARPGROUP_ROWS):
            for start in range(0, num_columns, piece):
                convert(step, stage, row, start)
        plgpu.commit_smem()
        for half in range(format.per_byte):
            x_mB = scratch.x_mi.at[stage, half * WARPGROUP_ROWS : (half + 1) * WARPGROUP_ROWS]
            plgpu.wgmma(sum_mo, x_mB, scratch.converted_oi.at[half * shape[1] : (half + 1) * shape[1]].T)

    return _accumulate(scratch, stages, multiply)


def _accumulate(scratch: Scratch, stages: Stages, multiply: Callable[[jax.Array, jax.Array, Any], None]) -> jax.Array:
    """Return the sum of all steps, f32[m, o]; `multiply(step, stage, sum)` adds a step to it."""

    def accumulate(sum_mo: Any) -> jax.Array:
        @pl.loop(0, stages.num_steps)
        def _step(step: jax.Array) -> None:
            multiply(step, stages.next(step), sum_mo)
            plgpu.wgmma_wait(0)

        return sum_mo[...]

    return pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(scratch.out_mo.shape, jnp.float32))


def _biased_f32(integer: jax.Array) -> jax.Array:
    """Return a small i32 plus `_F32_BIAS` as f32, in a quarter of the time that a conversion takes."""
    return lax.bitcast_convert_type(integer | _ABOVE_BITS, jnp.float32)
