"""Grouped products on Hopper GPUs: a kernel over blocks of 64 rows, each with its group's matrix.

Dimension key: C blocks, P places, m rows of a block (64), X matrices, I inputs, i a step of them, O outputs, o a block
of them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.api import ExpertShape, Matrices
from kernels_pallas.grouped_matmul.blocks import Blocks
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.warpgroup import WARPGROUP_ROWS, Stages, smem

# Inputs of a step: a row of either operand is then 128 bytes, which one swizzle spans.
_STEP_INPUTS = 64
_STAGES = 4
_BLOCK_OUTPUTS = (128, 64)


def check_shape(shape: ExpertShape) -> None:
    """Raise NotImplementedError for matrices that the kernel cannot multiply."""
    num_outputs, num_inputs, dtype = shape
    if dtype != jnp.bfloat16:
        raise NotImplementedError(f"experts in {dtype}: the kernel multiplies bfloat16")
    if num_inputs % _STEP_INPUTS or num_outputs % _BLOCK_OUTPUTS[-1]:
        raise NotImplementedError(
            f"experts of {num_inputs} inputs and {num_outputs} outputs on a device: the kernel wants multiples of "
            f"{_STEP_INPUTS} and {_BLOCK_OUTPUTS[-1]}"
        )


class _Inputs(NamedTuple):
    """Operands in global memory."""

    blocks: Blocks
    x_CmI: Any
    w_XOI: Any


class _Scratch(NamedTuple):
    """Stages of both operands, the barriers of their arrival, and the result on its way out."""

    x_mi: Any
    w_oi: Any
    arrived: Any
    out_mo: Any


class GpuGroupedMatmul:
    """A `GroupedMatmul`.

    Args:
        interpret: parameters of the GPU interpret mode, or False to compile.
    """

    def __init__(self, interpret: Any = False) -> None:
        self._interpret = interpret

    def block_rows(self, num_rows: int, num_groups: int) -> int:
        """See `GroupedMatmul`; as many as a warpgroup multiplies."""
        del num_rows, num_groups
        return WARPGROUP_ROWS

    def __call__(self, x_PI: jax.Array, matrices: Matrices, blocks: Blocks) -> jax.Array:
        """See `GroupedMatmul`."""
        w_XOI = matrices.values_XOI
        (num_places, num_inputs), num_outputs = x_PI.shape, w_XOI.shape[1]
        num_blocks = num_places // WARPGROUP_ROWS
        block_outputs = next(size for size in _BLOCK_OUTPUTS if num_outputs % size == 0)
        kernel = plgpu.kernel(
            partial(_multiply_block, num_steps=num_inputs // _STEP_INPUTS),
            out_type=jax.ShapeDtypeStruct((num_blocks, WARPGROUP_ROWS, num_outputs), x_PI.dtype),
            scratch_types=[
                _Scratch(
                    x_mi=smem((_STAGES, WARPGROUP_ROWS, _STEP_INPUTS), x_PI.dtype),
                    w_oi=smem((_STAGES, block_outputs, _STEP_INPUTS), x_PI.dtype),
                    arrived=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
                    out_mo=smem((WARPGROUP_ROWS, block_outputs), x_PI.dtype),
                )
            ],
            grid=(num_outputs // block_outputs, num_blocks),
            grid_names=("outputs", "block"),
            kernel_name="grouped_matmul",
            interpret=self._interpret,
        )
        x_CmI = x_PI.reshape(num_blocks, WARPGROUP_ROWS, num_inputs)
        return kernel(_Inputs(blocks, x_CmI, w_XOI)).reshape(num_places, num_outputs)


def _multiply_block(inputs: _Inputs, out_CmO: Any, scratch: _Scratch, *, num_steps: int) -> None:
    block, block_outputs = lax.axis_index("block"), scratch.out_mo.shape[1]

    @pl.when(block < inputs.blocks.num_1[0])
    def _multiply() -> None:
        group = inputs.blocks.group_C[block]
        outputs = pl.ds(lax.axis_index("outputs") * block_outputs, block_outputs)

        def copy(step: jax.Array, stage: jax.Array) -> None:
            columns, arrived = pl.ds(step * _STEP_INPUTS, _STEP_INPUTS), scratch.arrived.at[stage]
            plgpu.copy_gmem_to_smem(inputs.x_CmI.at[block, :, columns], scratch.x_mi.at[stage], arrived)
            plgpu.copy_gmem_to_smem(inputs.w_XOI.at[group, outputs, columns], scratch.w_oi.at[stage], arrived)

        stages = Stages(num_steps, copy, scratch.arrived)
        stages.start()

        def sum_up(sum_mo: Any) -> jax.Array:
            @pl.loop(0, num_steps)
            def _step(step: jax.Array) -> None:
                stage = stages.next(step)
                plgpu.wgmma(sum_mo, scratch.x_mi.at[stage], scratch.w_oi.at[stage].T)
                plgpu.wgmma_wait(0)

            return sum_mo[...]

        sum_mo = pl.run_scoped(sum_up, plgpu.WGMMAAccumulatorRef(scratch.out_mo.shape, jnp.float32))
        scratch.out_mo[...] = sum_mo.astype(scratch.out_mo.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.out_mo, out_CmO.at[block, :, outputs])
        plgpu.wait_smem_to_gmem(0)
