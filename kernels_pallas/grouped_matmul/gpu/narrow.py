"""Grouped matmul by bf16 matrices of any multiple of 16 outputs, such as LoRA matrices of experts, on Hopper GPUs.

The rows of a block are the rows of a wgmma product, so a block has 64 of them.

Dimension key: C blocks, P rows of all blocks, m rows of a block, X matrices, I inputs, i a step of them, O outputs, o a
block of them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from kernels_pallas.grouped_matmul.api import ExpertShape, Matrices, take_rows
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.quantized import QuantizedFormat, QuantizedRows
from kernels_pallas.token_tiles import Blocks
from kernels_pallas.warpgroup import WARPGROUP_ROWS, Stages, smem

# Inputs per step: a row of either operand is then at most 128 bytes, the span of one swizzle.
_STEP_INPUTS = (64, 32, 16)
_STAGES = 4
_BLOCK_OUTPUTS = (128, 64, 32, 16)


def is_narrow(shape: ExpertShape) -> bool:
    """Return whether matrices need this kernel instead of the one in `gpu/backend.py`."""
    return shape.format is None and (shape.transposed or shape.num_outputs % WARPGROUP_ROWS != 0)


def check_shape(shape: ExpertShape) -> None:
    """Raise NotImplementedError for matrices that the kernel cannot multiply."""
    if shape.format is not None:
        raise NotImplementedError(f"matrices in {shape.format.element_type}: the kernel supports only bfloat16")
    if shape.rows_dtype != jnp.bfloat16:
        raise NotImplementedError(f"matrices in {shape.rows_dtype}: the kernel supports only bfloat16")
    inputs, outputs = _STEP_INPUTS[-1], _BLOCK_OUTPUTS[-1]
    if shape.num_inputs % inputs or shape.num_outputs % outputs:
        raise NotImplementedError(
            f"matrices of {shape.num_inputs} inputs and {shape.num_outputs} outputs on a device: the kernel needs "
            f"multiples of {inputs} and {outputs}"
        )


class GpuNarrowMatmul:
    """A `GroupedMatmul`.

    Args:
        interpret: parameters of the GPU interpret mode, or False to compile.
    """

    max_dense_rows = 0
    max_compared = 1 << 22
    adds_bias = False

    def __init__(self, interpret: Any = False) -> None:
        self._interpret = interpret

    def takes_quantized_rows(self, format: QuantizedFormat, num_inputs: int) -> bool:
        """See `GroupedMatmul`."""
        del format, num_inputs
        return False

    def block_rows(self, num_rows: int, num_groups: int, row_bytes: int) -> int:
        """See `GroupedMatmul`; always the number of rows that a warpgroup multiplies."""
        del num_rows, num_groups, row_bytes
        return WARPGROUP_ROWS

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
        """See `GroupedMatmul`."""
        x_PI = take_rows(x, row_P)
        if isinstance(x_PI, QuantizedRows):
            raise NotImplementedError("the kernel does not multiply rows that are quantised")
        out_dtype = jnp.dtype(out_dtype or x_PI.dtype)
        x_CmI = x_PI.reshape(-1, WARPGROUP_ROWS, x_PI.shape[1])
        return [self._multiply(x_CmI, each.values_XOI, blocks, transposed, out_dtype) for each in matrices]

    def _multiply(
        self, x_CmI: jax.Array, w: jax.Array, blocks: Blocks, transposed: bool, out_dtype: jnp.dtype
    ) -> jax.Array:
        num_blocks, _, num_inputs = x_CmI.shape
        num_outputs = w.shape[2 if transposed else 1]
        outputs = next(size for size in _BLOCK_OUTPUTS if num_outputs % size == 0)
        # A row of a transposed matrix must span the swizzle of x.
        inputs = next(size for size in _STEP_INPUTS if num_inputs % size == 0 and (not transposed or size <= outputs))
        like = inputs if transposed else None
        kernel = plgpu.kernel(
            partial(_multiply_block, num_steps=num_inputs // inputs, transposed=transposed),
            out_type=jax.ShapeDtypeStruct((num_blocks, WARPGROUP_ROWS, num_outputs), out_dtype),
            scratch_types=[
                _Scratch(
                    x_mi=smem((_STAGES, WARPGROUP_ROWS, inputs), x_CmI.dtype, like=like),
                    w=smem((_STAGES, *((inputs, outputs) if transposed else (outputs, inputs))), w.dtype, like=like),
                    arrived=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
                    out_mo=smem((WARPGROUP_ROWS, outputs), out_dtype),
                )
            ],
            grid=(num_outputs // outputs, num_blocks),
            grid_names=("outputs", "block"),
            kernel_name="grouped_matmul",
            interpret=self._interpret,
        )
        return kernel(_Operands(blocks, x_CmI, w)).reshape(-1, num_outputs)


class _Operands(NamedTuple):
    """Operands in global memory; `w` is [X, O, I] or, transposed, [X, I, O]."""

    blocks: Blocks
    x_CmI: Any
    w: Any


class _Scratch(NamedTuple):
    """Pipeline stages of both operands, the barriers for their arrival, and the result before it is stored."""

    x_mi: Any
    w: Any
    arrived: Any
    out_mo: Any


def _multiply_block(operands: _Operands, out_CmO: Any, scratch: _Scratch, *, num_steps: int, transposed: bool) -> None:
    block, block_outputs, step_inputs = lax.axis_index("block"), scratch.out_mo.shape[1], scratch.x_mi.shape[2]

    @pl.when(block < operands.blocks.num_live)
    def _multiply() -> None:
        group = operands.blocks.group_C[block]
        outputs = pl.ds(lax.axis_index("outputs") * block_outputs, block_outputs)

        def copy(step: jax.Array, stage: jax.Array) -> None:
            inputs, arrived = pl.ds(step * step_inputs, step_inputs), scratch.arrived.at[stage]
            part = (inputs, outputs) if transposed else (outputs, inputs)
            plgpu.copy_gmem_to_smem(operands.x_CmI.at[block, :, inputs], scratch.x_mi.at[stage], arrived)
            plgpu.copy_gmem_to_smem(operands.w.at[group, *part], scratch.w.at[stage], arrived)

        stages = Stages(num_steps, copy, scratch.arrived)
        stages.start()

        def sum_up(sum_mo: Any) -> jax.Array:
            @pl.loop(0, num_steps)
            def _step(step: jax.Array) -> None:
                stage = stages.next(step)
                w = scratch.w.at[stage]
                plgpu.wgmma(sum_mo, scratch.x_mi.at[stage], w if transposed else w.T)
                plgpu.wgmma_wait(0)

            return sum_mo[...]

        sum_mo = pl.run_scoped(sum_up, plgpu.WGMMAAccumulatorRef(scratch.out_mo.shape, jnp.float32))
        scratch.out_mo[...] = sum_mo.astype(scratch.out_mo.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.out_mo, out_CmO.at[block, :, outputs])
        plgpu.wait_smem_to_gmem(0)
