"""Low-rank updates in portable XLA, in two ways.

Many tokens, those of prompts, are sorted by slot into blocks, and each block is brought its slot's factors. A few,
those of a decoding step, are multiplied by the factors of all slots and keep what is of their own: on a CPU blocks of a
row or two cost as much, since products of so few rows are bound by the factors' way to them.

The compiler finds by itself how to split it over a mesh.

Dimension key: T tokens, C blocks, W tokens of a block, P = C * W places, S slots (slot s at s - 1), R rank, I inputs,
O outputs, J = modules with the same inputs * R, N heads, H their numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.stacked import LoraPair, Stacked
from kernels_pallas.token_tiles import Blocks, PermutedRows, choose_block_rows, sort_into_blocks

# Few rows leave most places of a larger block empty, and of a smaller one products are no cheaper.
_MIN_ROWS = 4
_MAX_ROWS = 32
# So many tokens are few.
_FEW_TOKENS = 64


class TokenBlocks(NamedTuple):
    """The tokens by their slots.

    Attributes:
        blocks: their groups are slots, from 0.
        permuted: places of the tokens in them; those of slot 0 have none.
        own_TS: whether a slot is a token's own.
    """

    blocks: Blocks
    permuted: PermutedRows
    own_TS: jax.Array

    @property
    def few(self) -> bool:
        """Whether there are few tokens."""
        return self.own_TS.shape[0] <= _FEW_TOKENS

    def gather(self, x_TI: jax.Array) -> jax.Array:
        """Rows in their places, [C, W, ...]."""
        return x_TI[self.permuted.row_P].reshape(self.blocks.group_C.shape[0], -1, *x_TI.shape[1:])

    def scatter(self, y_CWO: jax.Array) -> jax.Array:
        """Rows in their order, [T, ...], and zeros for those that have no place."""
        y_PO = y_CWO.reshape(-1, *y_CWO.shape[2:])
        return y_PO.at[self.permuted.block_row_R].get(mode="fill", fill_value=0)

    def gather_matrices(self, matrices: Stacked) -> jax.Array:
        """The factors of each block's slot, [C, ...]."""
        return matrices.flat[self.blocks.group_C + matrices.first]


class XlaLora:
    """A `LoraMatmul`."""

    def plan(self, slot_T: jax.Array, num_slots: int) -> TokenBlocks:
        """Sort the tokens."""
        block_rows = choose_block_rows(slot_T.shape[0], num_slots, min_rows=_MIN_ROWS, max_rows=_MAX_ROWS)
        group_T = jnp.where(slot_T > 0, slot_T - 1, num_slots)
        own_TS = slot_T[:, None] == jnp.arange(1, num_slots + 1)
        return TokenBlocks(*sort_into_blocks(group_T, num_slots, block_rows), own_TS)

    def shrink(self, x_TI: jax.Array, a: Stacked, plan: TokenBlocks, *, split: bool = False) -> jax.Array:
        """See `LoraMatmul`; [C, W, J], or of few tokens [T, S, J] of all slots."""
        del split
        if plan.few:
            # As one matrix, as weights are: with three axes the compiler brings them into another order in every step.
            a_SJI = a.slice()
            return jnp.einsum("ti,ji->tj", x_TI, a_SJI.reshape(-1, a_SJI.shape[2])).reshape(-1, *a_SJI.shape[:2])
        return jnp.einsum("cwi,cji->cwj", plan.gather(x_TI), plan.gather_matrices(a))

    def expand(self, h: jax.Array, b: Stacked, plan: TokenBlocks, *, member: int = 0, split: bool = False) -> jax.Array:
        """See `LoraMatmul`."""
        del split
        rank = b.stack.shape[2]
        own_h = h[:, :, member * rank : (member + 1) * rank]
        if plan.few:
            h_TSR = jnp.where(plan.own_TS[:, :, None], own_h, jnp.zeros_like(own_h))
            b_SRO = b.slice()
            return jnp.einsum("tr,ro->to", h_TSR.reshape(len(h_TSR), -1), b_SRO.reshape(-1, b_SRO.shape[2]))
        h_CWR = own_h
        return plan.scatter(jnp.einsum("cwr,cro->cwo", h_CWR, plan.gather_matrices(b)))


def lora_embed(token_ids_T: jax.Array, a_SRI: jax.Array, b_SRO: jax.Array, slot_T: jax.Array) -> jax.Array:
    """[T, I]: row `token_ids_T` of A^T B of each token's slot, and 0 for slot 0; O are the ids."""
    lora = XlaLora()
    plan = lora.plan(slot_T, a_SRI.shape[0])
    h_TR = b_SRO[jnp.maximum(slot_T - 1, 0), :, token_ids_T]
    h = jnp.broadcast_to(h_TR[:, None], (len(h_TR), len(a_SRI), h_TR.shape[1])) if plan.few else plan.gather(h_TR)
    return lora.expand(h, Stacked(a_SRI[None], jnp.int32(0)), plan)


class HeadLora(NamedTuple):
    """Updates of a linear map [N * O, I] whose outputs are heads, where it is taken apart.

    Attributes:
        pair: its LoRA matrices.
        plan: plan of the step's tokens.
        split: where a head's outputs are cut in two: those that are applied to inputs, and those to outputs.
        num_heads: N, on all devices.
    """

    pair: LoraPair
    plan: TokenBlocks
    split: int
    num_heads: int

    def absorb(self, q_TNH: jax.Array) -> jax.Array:
        """`q W` with the first outputs of each head, [T, N, I]."""
        h_CWNR = jnp.einsum("cwnh,crnh->cwnr", self.plan.gather(q_TNH), self._by_head()[..., : self.split])
        return self.plan.scatter(jnp.einsum("cwnr,cri->cwni", h_CWNR, self.plan.gather_matrices(self.pair.a)))

    def project_v(self, o_TNI: jax.Array) -> jax.Array:
        """`W o` with the other outputs of each head, [T, N, V]."""
        h_CWNR = jnp.einsum("cwni,cri->cwnr", self.plan.gather(o_TNI), self.plan.gather_matrices(self.pair.a))
        return self.plan.scatter(jnp.einsum("cwnr,crnv->cwnv", h_CWNR, self._by_head()[..., self.split :]))

    def _by_head(self) -> jax.Array:
        """Second factors of each block, [C, R, N, O]."""
        b_CRO = self.plan.gather_matrices(self.pair.b)
        return b_CRO.reshape(*b_CRO.shape[:2], self.num_heads, -1)
