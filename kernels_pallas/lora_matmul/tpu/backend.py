"""LoRA matmuls on TPU: two kernels over pairs of a block of tokens and one of its slots.

LoRA matrices are fetched only for slots that tokens use. The pairs of a block are adjacent, so its result stays in VMEM
while the rows of each slot are written to it.

Dimension key: T tokens, t tokens of a block, S slots (without slot 0), X those of all layers, R rank, I inputs,
O outputs, i and o blocks of them, J = modules with the same inputs * R.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas.lora_matmul.common.sharded import Kernels, ShardedLora
from kernels_pallas.lora_matmul.common.slot_blocks import SlotPairs, slot_pairs
from kernels_pallas.mxu import mxu_dot
from kernels_pallas.pallas import pl, pltpu
from kernels_pallas.stacked import Stacked

_LANES = 128
_BLOCK_TOKENS = 256
# Columns of a block of inputs or outputs: 256 tokens in bf16 take 1 MiB, and each block is double-buffered.
_BLOCK_COLUMNS = 2048
# Elements of a block of the joint A matrices: a few MiB, double-buffered.
_BLOCK_ELEMENTS = 1 << 20
# If inputs are not a multiple of the lanes, a block has all of them, up to this number.
_WHOLE_COLUMNS = 8192


class TokenSlots(NamedTuple):
    """The tokens' slots, by token and by block.

    Attributes:
        slot_T1: i32, the slot of each token.
        pairs: pairs of blocks and their slots.
    """

    slot_T1: jax.Array
    pairs: SlotPairs


def make_lora_matmul(mesh: Mesh, interpret: Any = False) -> ShardedLora:
    """Make the LoRA matmul of a mesh.

    Args:
        mesh: mesh of the devices.
        interpret: parameters of the TPU interpret mode, or False to compile.
    """
    return ShardedLora(Kernels(plan, partial(shrink, interpret=interpret), partial(expand, interpret=interpret)), mesh)


def check_inputs(num_inputs: int) -> None:
    """Raise NotImplementedError if the kernel cannot split the inputs of one device into blocks."""
    if num_inputs % _LANES and num_inputs > _WHOLE_COLUMNS:
        raise NotImplementedError(
            f"{num_inputs} inputs on a device: more than {_WHOLE_COLUMNS} must be a multiple of {_LANES}"
        )


def plan(slot_T: jax.Array, num_slots: int) -> TokenSlots:
    """Find the slots of each block."""
    return TokenSlots(slot_T[:, None], slot_pairs(slot_T, num_slots, min(slot_T.shape[0], _BLOCK_TOKENS)))


def shrink(x_TI: jax.Array, a: Stacked, plan: TokenSlots, *, interpret: Any = False) -> jax.Array:
    """Return x A^T with the A matrices of each token's slot, f32[T, J]; rows of slot 0 hold arbitrary values."""
    a_XJI = a.flat
    (num_tokens, num_inputs), joint_rank = x_TI.shape, a_XJI.shape[1]
    block_tokens, block_inputs = min(num_tokens, _BLOCK_TOKENS), _block_inputs(num_inputs, joint_rank)
    num_steps = num_inputs // block_inputs
    return pl.pallas_call(
        partial(_shrink_pair, num_steps=num_steps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(SlotPairs._fields),
            grid=(plan.pairs.num_live_1[0], num_steps),
            in_specs=[
                pl.BlockSpec((block_tokens, 1), lambda u, i, _, block_U, *__: (block_U[u], 0)),
                pl.BlockSpec((block_tokens, block_inputs), lambda u, i, _, block_U, *__: (block_U[u], i)),
                pl.BlockSpec(
                    (1, joint_rank, block_inputs),
                    lambda u, i, first_1, _, slot_U, __: (first_1[0] + slot_U[u], 0, i),
                ),
            ],
            out_specs=pl.BlockSpec((block_tokens, joint_rank), lambda u, i, _, block_U, *__: (block_U[u], 0)),
            scratch_shapes=[pltpu.VMEM((block_tokens, joint_rank), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((num_tokens, joint_rank), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="lora_shrink",
    )(a.first[None], *plan.pairs, plan.slot_T1, x_TI, a_XJI)


def _shrink_pair(
    first_1: Any,
    block_U: Any,
    slot_U: Any,
    num_live_1: Any,
    slot_t1: Any,
    x_ti: Any,
    a_1Ji: Any,
    h_tJ: Any,
    sum_tJ: Any,
    *,
    num_steps: int,
) -> None:
    pair, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def _start() -> None:
        sum_tJ[...] = jnp.zeros_like(sum_tJ)

    sum_tJ[...] += mxu_dot(x_ti[...], a_1Ji[0], contract=1)

    @pl.when(step == num_steps - 1)
    def _put() -> None:
        h_tJ[...] = jnp.where(slot_t1[...] == slot_U[pair] + 1, sum_tJ[...], h_tJ[...])


def expand(h_TJ: jax.Array, b: Stacked, plan: TokenSlots, member: int = 0, *, interpret: Any = False) -> jax.Array:
    """Return h B with the B matrix of each token's slot, [T, O] in h's dtype, and 0 for slot 0.

    Of `h_TJ`, only the part of module `member` is used.
    """
    b_XRO = b.flat
    num_tokens, (_, rank, num_outputs) = h_TJ.shape[0], b_XRO.shape
    h_TR = h_TJ[:, member * rank : (member + 1) * rank]
    block_tokens, block_outputs = min(num_tokens, _BLOCK_TOKENS), min(num_outputs, _BLOCK_COLUMNS)
    out_TO = pl.pallas_call(
        _expand_pair,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(SlotPairs._fields),
            grid=(pl.cdiv(num_outputs, block_outputs), plan.pairs.num_live_1[0]),
            in_specs=[
                pl.BlockSpec((block_tokens, 1), lambda o, u, _, block_U, *__: (block_U[u], 0)),
                pl.BlockSpec((block_tokens, rank), lambda o, u, _, block_U, *__: (block_U[u], 0)),
                pl.BlockSpec(
                    (1, rank, block_outputs), lambda o, u, first_1, _, slot_U, __: (first_1[0] + slot_U[u], 0, o)
                ),
            ],
            out_specs=pl.BlockSpec((block_tokens, block_outputs), lambda o, u, _, block_U, *__: (block_U[u], o)),
        ),
        out_shape=jax.ShapeDtypeStruct((num_tokens, num_outputs), h_TR.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="lora_expand",
    )(b.first[None], *plan.pairs, plan.slot_T1, h_TR, b_XRO)
    # Rows without an adapter were not written.
    return jnp.where(plan.slot_T1 > 0, out_TO, jnp.zeros_like(out_TO))


def _expand_pair(_: Any, __: Any, slot_U: Any, ___: Any, slot_t1: Any, h_tR: Any, b_1Ro: Any, out_to: Any) -> None:
    own_t1 = slot_t1[...] == slot_U[pl.program_id(1)] + 1
    new_to = mxu_dot(h_tR[...], b_1Ro[0], contract=0).astype(out_to.dtype)
    out_to[...] = jnp.where(own_t1, new_to, out_to[...])


def _block_inputs(num_inputs: int, joint_rank: int) -> int:
    """Return the widest block that divides the inputs."""
    check_inputs(num_inputs)
    if num_inputs % _LANES:
        return num_inputs
    max_columns = max(_LANES, min(_BLOCK_COLUMNS, _BLOCK_ELEMENTS // joint_rank))
    return max(size for size in range(_LANES, max_columns + 1, _LANES) if num_inputs % size == 0)
