"""The slots that the tokens of each block use: a block is multiplied by the LoRA matrices of these slots only.

Tokens are not sorted by slot. The tokens of a prompt are adjacent, so most blocks use one slot; a decode step has one
or a few blocks, over which the rows of every slot are spread anyway, so sorting would gain nothing.

Dimension key: T tokens, C blocks, S slots without slot 0, U pairs of a block and a slot.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SlotPairs(NamedTuple):
    """Pairs of a block and one of its slots; the pairs of a block are adjacent.

    Attributes:
        block_U, slot_U: i32; the slot is an index into the LoRA matrices.
        num_live_1: i32, number of valid pairs; at least 1, even if no token uses that slot.
    """

    block_U: jax.Array
    slot_U: jax.Array
    num_live_1: jax.Array


class SlotLists(NamedTuple):
    """The slots of each block.

    Attributes:
        slot_CS: i32, indices into the LoRA matrices; the valid ones come first.
        num_C: i32, number of valid slots of each block.
    """

    slot_CS: jax.Array
    num_C: jax.Array


def slot_pairs(slot_T: jax.Array, num_slots: int, block_tokens: int) -> SlotPairs:
    """Find the pairs of blocks and slots."""
    present_CS = _present(slot_T, num_slots, block_tokens)
    pair_U = jnp.nonzero(present_CS.reshape(-1), size=present_CS.size, fill_value=0)[0].astype(jnp.int32)
    num = jnp.maximum(jnp.sum(present_CS, dtype=jnp.int32), 1)
    return SlotPairs(pair_U // num_slots, pair_U % num_slots, num[None])


def slot_lists(slot_T: jax.Array, num_slots: int, block_tokens: int) -> SlotLists:
    """Find the slots of each block."""
    present_CS = _present(slot_T, num_slots, block_tokens)
    slot_CS = jnp.argsort(~present_CS, axis=1, stable=True).astype(jnp.int32)
    return SlotLists(slot_CS, jnp.sum(present_CS, axis=1, dtype=jnp.int32))


def _present(slot_T: jax.Array, num_slots: int, block_tokens: int) -> jax.Array:
    slot_T = jnp.pad(slot_T, (0, -slot_T.shape[0] % block_tokens))
    slot_CT = slot_T.reshape(-1, block_tokens)
    return jnp.any(slot_CT[:, None, :] == jnp.arange(1, num_slots + 1)[:, None], axis=2)
