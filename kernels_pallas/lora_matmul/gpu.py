"""Low-rank updates on Hopper GPUs: two kernels over blocks of 64 tokens, which go through the slots of their tokens.

The factors of a slot are fetched when a token of the block has it. As a row has one slot only, nothing is added up over
slots: each slot's product is kept for its own rows.

Dimension key: T tokens, m tokens of a block (64), C blocks, S slots (without slot 0), R rank, I inputs, O outputs,
i and o blocks of them, K parts that the inputs are cut to.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from kernels_pallas.lora_matmul.api import LoraMatmul, LoraModule, in_two
from kernels_pallas.lora_matmul.slot_blocks import SlotLists, slot_lists
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.warpgroup import MATRIX, WARPGROUP_ROWS, along_rows, product, smem

# Inputs of a step: a row of the tokens' tile and of a factor's are then 128 bytes, which one swizzle spans.
_STEP_INPUTS = 64
_STAGES = 4
_BLOCK_OUTPUTS = (128, 64)
# What a product of the tensor cores takes along the rank, and what the registers hold of it.
_RANK_MULTIPLE = 16
_MAX_RANK = 128


def make_lora_matmul(mesh: Mesh, num_cores: int, interpret: Any = False) -> LoraMatmul:
    """The kernels on a mesh.

    Args:
        mesh: of the devices.
        num_cores: multiprocessors of a device.
        interpret: parameters of the GPU interpret mode, or False to compile.
    """
    return in_two(partial(shrink, num_cores=num_cores, interpret=interpret), partial(expand, interpret=interpret), mesh)


def check_module(module: LoraModule) -> None:
    """Raise NotImplementedError for a module that the kernels cannot serve."""
    num_inputs, num_outputs, rank, dtype = module
    if dtype != jnp.bfloat16:
        raise NotImplementedError(f"adapters in {dtype}: the kernels multiply bfloat16")
    if rank % _RANK_MULTIPLE or rank > _MAX_RANK:
        raise NotImplementedError(f"rank {rank}: the kernels want a multiple of {_RANK_MULTIPLE} up to {_MAX_RANK}")
    if num_inputs % _STEP_INPUTS or num_outputs % _BLOCK_OUTPUTS[-1]:
        raise NotImplementedError(
            f"a module of {num_inputs} inputs and {num_outputs} outputs on a device: the kernels want multiples of "
            f"{_STEP_INPUTS} and {_BLOCK_OUTPUTS[-1]}"
        )


class _ShrinkInputs(NamedTuple):
    """Operands in global memory."""

    slots: SlotLists
    slot_Cm: Any
    x_CmI: Any
    a_SRI: Any


class _ShrinkScratch(NamedTuple):
    """Stages of both operands, the barriers of their arrival, and the result on its way out."""

    x_mi: Any
    a_Ri: Any
    arrived: Any
    out_mR: Any


def shrink(
    x_TI: jax.Array, a_SRI: jax.Array, slot_T: jax.Array, *, num_cores: int, interpret: Any = False
) -> jax.Array:
    """(x A^T) of each token's slot, f32[T, R], and 0 for slot 0."""
    (num_tokens, num_inputs), rank = x_TI.shape, a_SRI.shape[1]
    inputs = _ShrinkInputs(
        slots=slot_lists(slot_T, a_SRI.shape[0], WARPGROUP_ROWS),
        slot_Cm=_to_blocks(slot_T),
        x_CmI=_to_blocks(x_TI),
        a_SRI=a_SRI,
    )
    num_blocks, num_steps = inputs.x_CmI.shape[0], num_inputs // _STEP_INPUTS
    # A step of decoding has few blocks: their inputs are cut, so that all multiprocessors work.
    num_parts = max(1, min(num_steps, num_cores // num_blocks))
    kernel = plgpu.kernel(
        partial(_shrink_block, steps_per_part=-(-num_steps // num_parts), num_steps=num_steps),
        out_type=jax.ShapeDtypeStruct((num_parts, num_blocks, WARPGROUP_ROWS, rank), jnp.float32),
        scratch_types=[
            _ShrinkScratch(
                x_mi=smem((_STAGES, WARPGROUP_ROWS, _STEP_INPUTS), x_TI.dtype),
                a_Ri=smem((_STAGES, rank, _STEP_INPUTS), x_TI.dtype),
                arrived=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
                out_mR=smem((WARPGROUP_ROWS, rank), jnp.float32),
            )
        ],
        grid=(num_blocks, num_parts),
        grid_names=("block", "part"),
        kernel_name="lora_shrink",
        interpret=interpret,
    )
    h_KCmR = kernel(inputs)
    return jnp.sum(h_KCmR, axis=0).reshape(-1, rank)[:num_tokens]


def _shrink_block(
    inputs: _ShrinkInputs, out_KCmR: Any, scratch: _ShrinkScratch, *, steps_per_part: int, num_steps: int
) -> None:
    block, part = lax.axis_index("block"), lax.axis_index("part")
    first = part * steps_per_part
    num_own = jnp.maximum(jnp.minimum(num_steps - first, steps_per_part), 0)
    rank = inputs.a_SRI.shape[1]

    def copy(step: jax.Array, stage: jax.Array) -> None:
        slot = inputs.slots.slot_CS[block, lax.div(step, num_own)]
        columns = pl.ds((first + lax.rem(step, num_own)) * _STEP_INPUTS, _STEP_INPUTS)
        arrived = scratch.arrived.at[stage]
        plgpu.copy_gmem_to_smem(inputs.x_CmI.at[block, :, columns], scratch.x_mi.at[stage], arrived)
        plgpu.copy_gmem_to_smem(inputs.a_SRI.at[slot, :, columns], scratch.a_Ri.at[stage], arrived)

    slot_m = plgpu.load(inputs.slot_Cm.at[block], optimized=False)
    zeros_mR = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, rank), jnp.float32), MATRIX)
    num_slots = inputs.slots.num_C[block]
    stages = _Stages(num_slots * num_own, copy, scratch.arrived)
    stages.start()

    def take_slot(index: jax.Array, h_mR: jax.Array) -> jax.Array:
        def multiply(step: jax.Array, sum_mR: jax.Array) -> jax.Array:
            stage = stages.next(index * num_own + step)
            return sum_mR + product(scratch.x_mi.at[stage], scratch.a_Ri.at[stage].T, rank)

        sum_mR = lax.fori_loop(0, num_own, multiply, zeros_mR)
        own_m = slot_m == inputs.slots.slot_CS[block, index] + 1
        return jnp.where(along_rows(own_m, rank), sum_mR, h_mR)

    scratch.out_mR[...] = lax.fori_loop(0, num_slots, take_slot, zeros_mR)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.out_mR, out_KCmR.at[part, block])
    plgpu.wait_smem_to_gmem(0)


class _ExpandInputs(NamedTuple):
    """Operands in global memory."""

    slots: SlotLists
    slot_Cm: Any
    h_CmR: Any
    b_SRO: Any


class _ExpandScratch(NamedTuple):
    """The tokens' tile and its barrier, stages of the factors, and the result on its way out."""

    h_mR: Any
    h_arrived: Any
    b_Ro: Any
    arrived: Any
    out_mo: Any


def expand(h_TR: jax.Array, b_SRO: jax.Array, slot_T: jax.Array, *, interpret: Any = False) -> jax.Array:
    """(h B) of each token's slot, [T, O] in h's dtype, and 0 for slot 0."""
    (num_tokens, rank), num_outputs = h_TR.shape, b_SRO.shape[-1]
    block_outputs = next(size for size in _BLOCK_OUTPUTS if num_outputs % size == 0)
    inputs = _ExpandInputs(
        slots=slot_lists(slot_T, b_SRO.shape[0], WARPGROUP_ROWS),
        slot_Cm=_to_blocks(slot_T),
        h_CmR=_to_blocks(h_TR),
        b_SRO=b_SRO,
    )
    num_blocks = inputs.h_CmR.shape[0]
    kernel = plgpu.kernel(
        partial(_expand_block, block_outputs=block_outputs),
        out_type=jax.ShapeDtypeStruct((num_blocks, WARPGROUP_ROWS, num_outputs), h_TR.dtype),
        scratch_types=[
            _ExpandScratch(
                h_mR=smem((WARPGROUP_ROWS, rank), h_TR.dtype),
                h_arrived=plgpu.Barrier(),
                b_Ro=smem((2, rank, block_outputs), h_TR.dtype, like=rank),
                arrived=plgpu.Barrier(num_barriers=2),
                out_mo=smem((WARPGROUP_ROWS, block_outputs), h_TR.dtype),
            )
        ],
        grid=(num_blocks, num_outputs // block_outputs),
        grid_names=("block", "outputs"),
        kernel_name="lora_expand",
        interpret=interpret,
    )
    return kernel(inputs).reshape(-1, num_outputs)[:num_tokens]


def _expand_block(inputs: _ExpandInputs, out_CmO: Any, scratch: _ExpandScratch, *, block_outputs: int) -> None:
    block = lax.axis_index("block")
    columns = pl.ds(lax.axis_index("outputs") * block_outputs, block_outputs)
    plgpu.copy_gmem_to_smem(inputs.h_CmR.at[block], scratch.h_mR, scratch.h_arrived)

    def copy(step: jax.Array, stage: jax.Array) -> None:
        slot = inputs.slots.slot_CS[block, step]
        plgpu.copy_gmem_to_smem(inputs.b_SRO.at[slot, :, columns], scratch.b_Ro.at[stage], scratch.arrived.at[stage])

    slot_m = plgpu.load(inputs.slot_Cm.at[block], optimized=False)
    num_slots = inputs.slots.num_C[block]
    stages = _Stages(num_slots, copy, scratch.arrived)
    stages.start()

    def take_slot(index: jax.Array, out_mo: jax.Array) -> jax.Array:
        new_mo = product(scratch.h_mR, scratch.b_Ro.at[stages.next(index)], block_outputs)
        own_m = slot_m == inputs.slots.slot_CS[block, index] + 1
        return jnp.where(along_rows(own_m, block_outputs), new_mo, out_mo)

    plgpu.barrier_wait(scratch.h_arrived)
    zeros_mo = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, block_outputs), jnp.float32), MATRIX)
    out_mo = lax.fori_loop(0, num_slots, take_slot, zeros_mo)
    scratch.out_mo[...] = out_mo.astype(scratch.out_mo.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.out_mo, out_CmO.at[block, :, columns])
    plgpu.wait_smem_to_gmem(0)


class _Stages(NamedTuple):
    """Steps whose operands arrive while those before are worked on; a step's stage is free when its work is done.

    Attributes:
        num_steps: i32.
        copy: (step, stage): sends for the operands of a step.
        arrived: barriers of the stages.
    """

    num_steps: jax.Array
    copy: Callable[[jax.Array, jax.Array], None]
    arrived: Any

    def start(self) -> None:
        """Send for the first steps."""
        for step in range(self.arrived.shape[0] - 1):
            pl.when(step < self.num_steps)(partial(self.copy, jnp.int32(step), jnp.int32(step)))

    def next(self, step: jax.Array) -> jax.Array:
        """Wait for a step, the work of the one before being done; returns its stage."""
        num_stages = self.arrived.shape[0]
        ahead = step + num_stages - 1
        pl.when(ahead < self.num_steps)(partial(self.copy, ahead, lax.rem(ahead, num_stages)))
        stage = lax.rem(step, num_stages)
        plgpu.barrier_wait(self.arrived.at[stage])
        return stage


def _to_blocks(array: jax.Array) -> jax.Array:
    """[T, ...] -> [C, 64, ...]; the last block is filled up with zeros."""
    array = jnp.pad(array, ((0, -array.shape[0] % WARPGROUP_ROWS), *((0, 0),) * (array.ndim - 1)))
    return array.reshape(-1, WARPGROUP_ROWS, *array.shape[1:])
