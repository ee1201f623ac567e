"""LoRA matmuls on Hopper GPUs: two kernels over blocks of 64 tokens, which loop over the slots of their tokens.

The LoRA matrices of a slot are fetched only if a token of the block uses it. Since a row has one slot, nothing is
summed over slots: each slot's product is kept only for the rows of that slot.

Dimension key: T tokens, m tokens of a block (64), C blocks, S slots (without slot 0), X those of all layers, R rank,
I inputs, O outputs, i and o blocks of them, K parts into which the inputs are split, J = modules with the same
inputs * R, j a part of it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from kernels_pallas.lora_matmul.api import LoraModule
from kernels_pallas.lora_matmul.common.sharded import Kernels, ShardedLora
from kernels_pallas.lora_matmul.common.slot_blocks import SlotLists, slot_lists
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.stacked import Stacked
from kernels_pallas.warpgroup import MATRIX, WARPGROUP_ROWS, Stages, broadcast_rows, product, smem

# Inputs per step: a row of the token tile and of the A tile is then 128 bytes, the span of one swizzle.
_STEP_INPUTS = 64
_STAGES = 4
_BLOCK_OUTPUTS = (128, 64)
# The granularity of the rank in a tensor core product, and the maximum rank that fits in registers.
_RANK_MULTIPLE = 16
_MAX_RANK = 128


def make_lora_matmul(mesh: Mesh, num_cores: int, interpret: Any = False) -> ShardedLora:
    """Make the LoRA matmul of a mesh.

    Args:
        mesh: mesh of the devices.
        num_cores: number of SMs of a device.
        interpret: parameters of the GPU interpret mode, or False to compile.
    """
    kernels = Kernels(
        plan, partial(shrink, num_cores=num_cores, interpret=interpret), partial(expand, interpret=interpret)
    )
    return ShardedLora(kernels, mesh)


def check_module(module: LoraModule) -> None:
    """Raise NotImplementedError for a module that the kernels do not support."""
    num_inputs, num_outputs, rank, dtype = module
    if dtype != jnp.bfloat16:
        raise NotImplementedError(f"adapters in {dtype}: the kernels support only bfloat16")
    if rank % _RANK_MULTIPLE or rank > _MAX_RANK:
        raise NotImplementedError(f"rank {rank}: the kernels need a multiple of {_RANK_MULTIPLE} up to {_MAX_RANK}")
    if num_inputs % _STEP_INPUTS or num_outputs % _BLOCK_OUTPUTS[-1]:
        raise NotImplementedError(
            f"a module of {num_inputs} inputs and {num_outputs} outputs on a device: the kernels need multiples of "
            f"{_STEP_INPUTS} and {_BLOCK_OUTPUTS[-1]}"
        )


class TokenSlots(NamedTuple):
    """The tokens' slots, by token and by block.

    Attributes:
        slot_Cm: i32, the slot of each token; the last block is padded with slot 0.
        slots: the slots of each block.
    """

    slot_Cm: Any
    slots: SlotLists


def plan(slot_T: jax.Array, num_slots: int) -> TokenSlots:
    """Find the slots of each block."""
    return TokenSlots(_to_blocks(slot_T), slot_lists(slot_T, num_slots, WARPGROUP_ROWS))


class _ShrinkInputs(NamedTuple):
    """Operands in global memory."""

    plan: TokenSlots
    first_1: Any
    x_CmI: Any
    a_XJI: Any


class _ShrinkScratch(NamedTuple):
    """Pipeline stages of both operands, the barriers for their arrival, and the result before it is stored."""

    x_mi: Any
    a_ji: Any
    arrived: Any
    out_mj: Any


def shrink(x_TI: jax.Array, a: Stacked, plan: TokenSlots, *, num_cores: int, interpret: Any = False) -> jax.Array:
    """Return x A^T with the A matrices of each token's slot, f32[T, J], and 0 for slot 0."""
    (num_tokens, num_inputs), joint_rank = x_TI.shape, a.stack.shape[2]
    inputs = _ShrinkInputs(plan, a.first[None], _to_blocks(x_TI), a.flat)
    part_rank = max(size for size in range(_RANK_MULTIPLE, _MAX_RANK + 1, _RANK_MULTIPLE) if joint_rank % size == 0)
    num_blocks, num_rank_parts, num_steps = inputs.x_CmI.shape[0], joint_rank // part_rank, num_inputs // _STEP_INPUTS
    # A decode step has few blocks: their inputs are split, so that all SMs are busy.
    num_parts = max(1, min(num_steps, num_cores // (num_blocks * num_rank_parts)))
    kernel = plgpu.kernel(
        partial(_shrink_block, steps_per_part=-(-num_steps // num_parts), num_steps=num_steps),
        out_type=jax.ShapeDtypeStruct((num_parts, num_blocks, WARPGROUP_ROWS, joint_rank), jnp.float32),
        scratch_types=[
            _ShrinkScratch(
                x_mi=smem((_STAGES, WARPGROUP_ROWS, _STEP_INPUTS), x_TI.dtype),
                a_ji=smem((_STAGES, part_rank, _STEP_INPUTS), x_TI.dtype),
                arrived=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
                out_mj=smem((WARPGROUP_ROWS, part_rank), jnp.float32),
            )
        ],
        grid=(num_blocks, num_rank_parts, num_parts),
        grid_names=("block", "rank_part", "part"),
        kernel_name="lora_shrink",
        interpret=interpret,
    )
    h_KCmJ = kernel(inputs)
    return jnp.sum(h_KCmJ, axis=0).reshape(-1, joint_rank)[:num_tokens]


def _shrink_block(
    inputs: _ShrinkInputs, out_KCmJ: Any, scratch: _ShrinkScratch, *, steps_per_part: int, num_steps: int
) -> None:
    (slot_Cm, slots), block, part = inputs.plan, lax.axis_index("block"), lax.axis_index("part")
    part_rank = scratch.out_mj.shape[1]
    ranks = pl.ds(lax.axis_index("rank_part") * part_rank, part_rank)
    first = part * steps_per_part
    num_own = jnp.maximum(jnp.minimum(num_steps - first, steps_per_part), 0)

    def copy(step: jax.Array, stage: jax.Array) -> None:
        slot = inputs.first_1[0] + slots.slot_CS[block, lax.div(step, num_own)]
        columns = pl.ds((first + lax.rem(step, num_own)) * _STEP_INPUTS, _STEP_INPUTS)
        arrived = scratch.arrived.at[stage]
        plgpu.copy_gmem_to_smem(inputs.x_CmI.at[block, :, columns], scratch.x_mi.at[stage], arrived)
        plgpu.copy_gmem_to_smem(inputs.a_XJI.at[slot, ranks, columns], scratch.a_ji.at[stage], arrived)

    slot_m = plgpu.load(slot_Cm.at[block], optimized=False)
    zeros_mj = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, part_rank), jnp.float32), MATRIX)
    num_slots = slots.num_C[block]
    stages = Stages(num_slots * num_own, copy, scratch.arrived)
    stages.start()

    def take_slot(index: jax.Array, h_mj: jax.Array) -> jax.Array:
        def multiply(step: jax.Array, sum_mj: jax.Array) -> jax.Array:
            stage = stages.next(index * num_own + step)
            return sum_mj + product(scratch.x_mi.at[stage], scratch.a_ji.at[stage].T, part_rank)

        sum_mj = lax.fori_loop(0, num_own, multiply, zeros_mj)
        own_m = slot_m == slots.slot_CS[block, index] + 1
        return jnp.where(broadcast_rows(own_m, part_rank), sum_mj, h_mj)

    scratch.out_mj[...] = lax.fori_loop(0, num_slots, take_slot, zeros_mj)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.out_mj, out_KCmJ.at[part, block, :, ranks])
    plgpu.wait_smem_to_gmem(0)


class _ExpandInputs(NamedTuple):
    """Operands in global memory."""

    plan: TokenSlots
    first_1: Any
    h_CmJ: Any
    b_XRO: Any


class _ExpandScratch(NamedTuple):
    """The token tile and its barrier, pipeline stages of B with theirs, and the result before it is stored."""

    h_mR: Any
    h_arrived: Any
    b_Ro: Any
    arrived: Any
    out_mo: Any


def expand(h_TJ: jax.Array, b: Stacked, plan: TokenSlots, member: int = 0, *, interpret: Any = False) -> jax.Array:
    """Return h B with the B matrix of each token's slot, [T, O] in h's dtype, and 0 for slot 0.

    Of `h_TJ`, only the part of module `member` is used.
    """
    num_tokens, (*_, rank, num_outputs) = h_TJ.shape[0], b.stack.shape
    block_outputs = next(size for size in _BLOCK_OUTPUTS if num_outputs % size == 0)
    inputs = _ExpandInputs(plan, b.first[None], _to_blocks(h_TJ), b.flat)
    num_blocks = inputs.h_CmJ.shape[0]
    kernel = plgpu.kernel(
        partial(_expand_block, block_outputs=block_outputs, member=member),
        out_type=jax.ShapeDtypeStruct((num_blocks, WARPGROUP_ROWS, num_outputs), h_TJ.dtype),
        scratch_types=[
            _ExpandScratch(
                h_mR=smem((WARPGROUP_ROWS, rank), h_TJ.dtype),
                h_arrived=plgpu.Barrier(),
                b_Ro=smem((2, rank, block_outputs), h_TJ.dtype, like=rank),
                arrived=plgpu.Barrier(num_barriers=2),
                out_mo=smem((WARPGROUP_ROWS, block_outputs), h_TJ.dtype),
            )
        ],
        grid=(num_blocks, num_outputs // block_outputs),
        grid_names=("block", "outputs"),
        kernel_name="lora_expand",
        interpret=interpret,
    )
    return kernel(inputs).reshape(-1, num_outputs)[:num_tokens]


def _expand_block(
    inputs: _ExpandInputs, out_CmO: Any, scratch: _ExpandScratch, *, block_outputs: int, member: int
) -> None:
    (slot_Cm, slots), block, rank = inputs.plan, lax.axis_index("block"), inputs.b_XRO.shape[1]
    columns = pl.ds(lax.axis_index("outputs") * block_outputs, block_outputs)
    plgpu.copy_gmem_to_smem(inputs.h_CmJ.at[block, :, pl.ds(member * rank, rank)], scratch.h_mR, scratch.h_arrived)

    def copy(step: jax.Array, stage: jax.Array) -> None:
        slot = inputs.first_1[0] + slots.slot_CS[block, step]
        plgpu.copy_gmem_to_smem(inputs.b_XRO.at[slot, :, columns], scratch.b_Ro.at[stage], scratch.arrived.at[stage])

    slot_m = plgpu.load(slot_Cm.at[block], optimized=False)
    num_slots = slots.num_C[block]
    stages = Stages(num_slots, copy, scratch.arrived)
    stages.start()

    def take_slot(index: jax.Array, out_mo: jax.Array) -> jax.Array:
        new_mo = product(scratch.h_mR, scratch.b_Ro.at[stages.next(index)], block_outputs)
        own_m = slot_m == slots.slot_CS[block, index] + 1
        return jnp.where(broadcast_rows(own_m, block_outputs), new_mo, out_mo)

    plgpu.barrier_wait(scratch.h_arrived)
    zeros_mo = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, block_outputs), jnp.float32), MATRIX)
    out_mo = lax.fori_loop(0, num_slots, take_slot, zeros_mo)
    scratch.out_mo[...] = out_mo.astype(scratch.out_mo.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.out_mo, out_CmO.at[block, :, columns])
    plgpu.wait_smem_to_gmem(0)


def _to_blocks(array: jax.Array) -> jax.Array:
    """Reshape [T, ...] to [C, 64, ...]; the last block is padded with zeros."""
    array = jnp.pad(array, ((0, -array.shape[0] % WARPGROUP_ROWS), *((0, 0),) * (array.ndim - 1)))
    return array.reshape(-1, WARPGROUP_ROWS, *array.shape[1:])
