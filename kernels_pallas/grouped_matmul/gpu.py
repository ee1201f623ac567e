"""Grouped products on Hopper GPUs: a kernel over blocks of 64 rows, each with its group's matrix.

Dimension key: C blocks, P places, m rows of a block (64), X matrices, I inputs, i a step of them, O outputs, o a block
of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.blocks import Blocks
from kernels_pallas.grouped_matmul.api import ExpertShape, Matrices
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.quantized import QuantizedFormat
from kernels_pallas.warpgroup import MATRIX, WARPGROUP_ROWS, Stages, product, smem

# Inputs of a step: a row of either operand is then 128 bytes, which one swizzle spans. Fewer are
# for factors of adapters.
_STEP_INPUTS = 64
_STEPS_INPUTS = (_STEP_INPUTS, 32, 16)
_STAGES = 4
_BLOCK_OUTPUTS = (128, 64, 32, 16)
# Of quantised matrices: conversions are in pieces of as many rows.
_QUANTIZED_OUTPUTS = 64
# Of quantised matrices: a block is two steps of one block of outputs, or a whole row.
_IN_BLOCKS = QuantizedFormat("fp8", (128, 128))
_BY_ROW = (QuantizedFormat("fp8", (1, 0)), QuantizedFormat("int8", (1, 0)))


def check_shape(shape: ExpertShape) -> None:
    """Raise NotImplementedError for matrices that the kernel cannot multiply."""
    num_outputs, num_inputs, dtype, form = shape[:4]
    if dtype != jnp.bfloat16:
        raise NotImplementedError(f"matrices in {dtype}: the kernel multiplies bfloat16")
    if form not in (None, _IN_BLOCKS, *_BY_ROW):
        raise NotImplementedError(
            f"matrices in {form.numbers} and blocks of {form.block}: the kernel wants {_IN_BLOCKS.numbers} in "
            f"{_IN_BLOCKS.block}, or 8 bits with a factor for each row"
        )
    inputs, outputs = _STEPS_INPUTS[-1], _BLOCK_OUTPUTS[-1]
    if form is not None:
        inputs, outputs = form.block if form == _IN_BLOCKS else (_STEP_INPUTS, _QUANTIZED_OUTPUTS)
    if num_inputs % inputs or num_outputs % outputs:
        raise NotImplementedError(
            f"matrices of {num_inputs} inputs and {num_outputs} outputs on a device: the kernel wants multiples of "
            f"{inputs} and {outputs}"
        )


class _Inputs(NamedTuple):
    """Operands in global memory.

    Attributes:
        w: matrices, [X, O, I] or, transposed, [X, I, O].
        scale: of quantised matrices, [X, o, i] or, of rows, [X, O]; else None.
    """

    blocks: Blocks
    x_CmI: Any
    w: Any
    scale: Any


class _Scratch(NamedTuple):
    """Stages of both operands, the barriers of their arrival, and the result on its way out.

    Attributes:
        w: stages of the matrix, [o, i] or, transposed, [i, o].
        converted_oi: a stage of a quantised matrix, in the rows' dtype; else None.
    """

    x_mi: Any
    w: Any
    arrived: Any
    out_mo: Any
    converted_oi: Any


# What sums up the steps of a block of outputs, f32[m, o].
_SumUp: TypeAlias = Callable[[_Inputs, _Scratch, Stages, jax.Array], jax.Array]


class GpuGroupedMatmul:
    """A `GroupedMatmul`.

    Args:
        interpret: parameters of the GPU interpret mode, or False to compile.
    """

    def __init__(self, interpret: Any = False) -> None:
        self._interpret = interpret

    def block_rows(self, num_rows: int, num_groups: int, row_bytes: int) -> int:
        """See `GroupedMatmul`; as many as a warpgroup multiplies."""
        del num_rows, num_groups, row_bytes
        return WARPGROUP_ROWS

    def __call__(self, x_PI: jax.Array, matrices: Matrices, blocks: Blocks, *, transposed: bool = False) -> jax.Array:
        """See `GroupedMatmul`."""
        w, scale = matrices.values_XOI, matrices.scale_Xoi
        sum_up = partial(_sum_up, transposed=transposed) if scale is None else _sum_up_blocks
        if scale is not None and matrices.form in _BY_ROW:
            sum_up, scale = _sum_up_rows, scale[:, :, 0]
        (num_places, num_inputs), num_outputs = x_PI.shape, w.shape[2 if transposed else 1]
        num_blocks = num_places // WARPGROUP_ROWS
        block_outputs = next(size for size in _BLOCK_OUTPUTS if num_outputs % size == 0)
        most = block_outputs if transposed else _STEP_INPUTS  # a row of the matrix must span a row's swizzle
        step_inputs = next(size for size in _STEPS_INPUTS if num_inputs % size == 0 and size <= most)
        block = (step_inputs, block_outputs) if transposed else (block_outputs, step_inputs)
        kernel = plgpu.kernel(
            partial(_multiply_block, num_steps=num_inputs // step_inputs, sum_up=sum_up, transposed=transposed),
            out_type=jax.ShapeDtypeStruct((num_blocks, WARPGROUP_ROWS, num_outputs), x_PI.dtype),
            scratch_types=[
                _Scratch(
                    x_mi=smem((_STAGES, WARPGROUP_ROWS, step_inputs), x_PI.dtype),
                    w=smem((_STAGES, *block), w.dtype, like=step_inputs if transposed else None),
                    arrived=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
                    out_mo=smem((WARPGROUP_ROWS, block_outputs), x_PI.dtype),
                    converted_oi=None if scale is None else smem((block_outputs, step_inputs), x_PI.dtype),
                )
            ],
            grid=(num_outputs // block_outputs, num_blocks),
            grid_names=("outputs", "block"),
            kernel_name="grouped_matmul",
            interpret=self._interpret,
        )
        x_CmI = x_PI.reshape(num_blocks, WARPGROUP_ROWS, num_inputs)
        return kernel(_Inputs(blocks, x_CmI, w, scale)).reshape(num_places, num_outputs)


def _multiply_block(
    inputs: _Inputs, out_CmO: Any, scratch: _Scratch, *, num_steps: int, sum_up: _SumUp, transposed: bool
) -> None:
    block, block_outputs, step_inputs = lax.axis_index("block"), scratch.out_mo.shape[1], scratch.x_mi.shape[2]

    @pl.when(block < inputs.blocks.num_1[0])
    def _multiply() -> None:
        group = inputs.blocks.group_C[block]
        outputs = pl.ds(lax.axis_index("outputs") * block_outputs, block_outputs)

        def copy(step: jax.Array, stage: jax.Array) -> None:
            columns, arrived = pl.ds(step * step_inputs, step_inputs), scratch.arrived.at[stage]
            part = (columns, outputs) if transposed else (outputs, columns)
            plgpu.copy_gmem_to_smem(inputs.x_CmI.at[block, :, columns], scratch.x_mi.at[stage], arrived)
            plgpu.copy_gmem_to_smem(inputs.w.at[group, *part], scratch.w.at[stage], arrived)

        stages = Stages(num_steps, copy, scratch.arrived)
        stages.start()

        sum_mo = sum_up(inputs, scratch, stages, group)
        scratch.out_mo[...] = sum_mo.astype(scratch.out_mo.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.out_mo, out_CmO.at[block, :, outputs])
        plgpu.wait_smem_to_gmem(0)


def _sum_up(_: _Inputs, scratch: _Scratch, stages: Stages, __: jax.Array, *, transposed: bool) -> jax.Array:
    """The product of all steps, f32[m, o]."""

    def accumulate(sum_mo: Any) -> jax.Array:
        @pl.loop(0, stages.num_steps)
        def _step(step: jax.Array) -> None:
            stage = stages.next(step)
            w = scratch.w.at[stage]
            plgpu.wgmma(sum_mo, scratch.x_mi.at[stage], w if transposed else w.T)
            plgpu.wgmma_wait(0)

        return sum_mo[...]

    return pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(scratch.out_mo.shape, jnp.float32))


def _sum_up_blocks(inputs: _Inputs, scratch: _Scratch, stages: Stages, group: jax.Array) -> jax.Array:
    """The same of a matrix in blocks: the result of each step is scaled."""
    shape, row = scratch.out_mo.shape, lax.axis_index("outputs")

    def scaled(step: jax.Array, part_mo: jax.Array) -> jax.Array:
        scale = inputs.scale[group, row, lax.div(step, _IN_BLOCKS.block[1] // _STEP_INPUTS)]
        return part_mo * plgpu.layout_cast(lax.broadcast_in_dim(scale, shape, ()), MATRIX)

    return _sum_up_converted(scratch, stages, scaled)


def _sum_up_rows(inputs: _Inputs, scratch: _Scratch, stages: Stages, group: jax.Array) -> jax.Array:
    """The same of a matrix whose rows have factors: the sum is scaled."""
    sum_mo = _sum_up_converted(scratch, stages, lambda _, part_mo: part_mo)
    shape = scratch.out_mo.shape
    outputs = pl.ds(lax.axis_index("outputs") * shape[1], shape[1])
    scale_o = plgpu.load(inputs.scale.at[group, outputs], layout=MATRIX.reduce(0), optimized=False)
    return sum_mo * lax.broadcast_in_dim(scale_o.astype(jnp.float32), shape, [1])


def _sum_up_converted(
    scratch: _Scratch, stages: Stages, scaled: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """The product of all steps, each converted and then scaled."""
    shape = scratch.out_mo.shape

    def multiply(step: jax.Array, sum_mo: jax.Array) -> jax.Array:
        stage = stages.next(step)
        for start in range(0, shape[1], WARPGROUP_ROWS):
            rows = slice(start, start + WARPGROUP_ROWS)
            source = scratch.w.at[stage, rows]
            w_oi = plgpu.load(source, layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
            if jnp.issubdtype(w_oi.dtype, jnp.floating):
                # Hopper has no instruction from 8 to 16 bits of this kind; both steps are exact.
                w_oi = w_oi.astype(jnp.float32)
            scratch.converted_oi.at[rows][...] = plgpu.layout_cast(w_oi.astype(scratch.converted_oi.dtype), MATRIX)
        plgpu.commit_smem()
        return sum_mo + scaled(step, product(scratch.x_mi.at[stage], scratch.converted_oi.T, shape[1]))

    zeros_mo = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)
    return lax.fori_loop(0, stages.num_steps, multiply, zeros_mo)
