"""LoRA matmuls in portable XLA, in two ways.

The many tokens of prefill steps are sorted by slot into blocks, and the LoRA matrices of each block's slot are
gathered. The few tokens of decode steps are multiplied by the matrices of all slots, and only the part of each token's
slot is kept: on CPU, blocks of a row or two cost as much, since such small products are bound by loading the matrices.

The compiler decides how to split the products over a mesh.

Dimension key: T tokens, C blocks, W tokens of a block, P = C * W block rows, S slots (slot s at index s - 1), R rank,
I inputs, O outputs, J = modules with the same inputs * R, N heads, H channels of a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.stacked import LoraPair, Stacked
from kernels_pallas.token_tiles import Blocks, PermutedRows, choose_block_rows, sort_into_blocks

# With few rows, larger blocks would be mostly padding; products of smaller blocks are no cheaper.
_MIN_ROWS = 4
_MAX_ROWS = 32
# Up to this number of tokens are multiplied by the matrices of all slots.
_FEW_TOKENS = 64


class TokenBlocks(NamedTuple):
    """The tokens, sorted into blocks by slot.

    Attributes:
        blocks: the blocks, whose groups are slots, counted from 0.
        permuted: positions of the tokens in the blocks; tokens of slot 0 are in none.
        own_TS: bool, whether a slot is the token's own.
    """

    blocks: Blocks
    permuted: PermutedRows
    own_TS: jax.Array

    @property
    def uses_all_slots(self) -> bool:
        """Whether there are at most `_FEW_TOKENS` tokens."""
        return self.own_TS.shape[0] <= _FEW_TOKENS

    def gather(self, x_TI: jax.Array) -> jax.Array:
        """Gather the tokens' rows into blocks, [C, W, ...]."""
        return x_TI[self.permuted.row_P].reshape(self.blocks.group_C.shape[0], -1, *x_TI.shape[1:])

    def scatter(self, y_CWO: jax.Array) -> jax.Array:
        """Bring block rows back into token order, [T, ...], with zeros for tokens in no block."""
        y_PO = y_CWO.reshape(-1, *y_CWO.shape[2:])
        return y_PO.at[self.permuted.block_row_R].get(mode="fill", fill_value=0)

    def gather_matrices(self, matrices: Stacked) -> jax.Array:
        """Gather the LoRA matrices of each block's slot, [C, ...]."""
        return matrices.flat[self.blocks.group_C + matrices.first]


class XlaLora:
    """A `LoraMatmul`."""

    def plan(self, slot_T: jax.Array, num_slots: int) -> TokenBlocks:
        """Sort the tokens by slot."""
        block_rows = choose_block_rows(slot_T.shape[0], num_slots, min_rows=_MIN_ROWS, max_rows=_MAX_ROWS)
        group_T = jnp.where(slot_T > 0, slot_T - 1, num_slots)
        own_TS = slot_T[:, None] == jnp.arange(1, num_slots + 1)
        return TokenBlocks(*sort_into_blocks(group_T, num_slots, block_rows), own_TS)

    def shrink(self, x_TI: jax.Array, a: Stacked, plan: TokenBlocks, *, split: bool = False) -> jax.Array:
        """See `LoraMatmul`; returns [C, W, J], or for few tokens [T, S, J] over all slots."""
        del split
        if plan.uses_all_slots:
            # One 2-D matrix, like a weight: with three axes the compiler would change its layout in every step.
            a_SJI = a.slice()
            return jnp.einsum("ti,ji->tj", x_TI, a_SJI.reshape(-1, a_SJI.shape[2])).reshape(-1, *a_SJI.shape[:2])
        return jnp.einsum("cwi,cji->cwj", plan.gather(x_TI), plan.gather_matrices(a))

    def expand(self, h: jax.Array, b: Stacked, plan: TokenBlocks, *, member: int = 0, split: bool = False) -> jax.Array:
        """See `LoraMatmul`."""
        del split
        rank = b.stack.shape[2]
        own_h = h[:, :, member * rank : (member + 1) * rank]
        if plan.uses_all_slots:
            h_TSR = jnp.where(plan.own_TS[:, :, None], own_h, jnp.zeros_like(own_h))
            b_SRO = b.slice()
            return jnp.einsum("tr,ro->to", h_TSR.reshape(len(h_TSR), -1), b_SRO.reshape(-1, b_SRO.shape[2]))
        h_CWR = own_h
        return plan.scatter(jnp.einsum("cwr,cro->cwo", h_CWR, plan.gather_matrices(b)))


def lora_embed(token_ids_T: jax.Array, a_SRI: jax.Array, b_SRO: jax.Array, slot_T: jax.Array) -> jax.Array:
    """Return row `token_ids_T` of B^T A of each token's slot, [T, I], and 0 for slot 0; O are the token ids."""
    lora = XlaLora()
    plan = lora.plan(slot_T, a_SRI.shape[0])
    h_TR = b_SRO[jnp.maximum(slot_T - 1, 0), :, token_ids_T]
    h = (
        jnp.broadcast_to(h_TR[:, None], (len(h_TR), len(a_SRI), h_TR.shape[1]))
        if plan.uses_all_slots
        else plan.gather(h_TR)
    )
    return lora.expand(h, Stacked(a_SRI[None], jnp.int32(0)), plan)


class HeadLora(NamedTuple):
    """LoRA of a linear map [N * O, I] whose outputs are heads, in the absorbed form of MLA.

    Attributes:
        pair: its LoRA matrices.
        plan: plan of the step's tokens.
        split: number of outputs of each head that `absorb` applies; `project_v` applies the others.
        num_heads: N, over all devices.
    """

    pair: LoraPair
    plan: TokenBlocks
    split: int
    num_heads: int

    def absorb(self, q_TNH: jax.Array) -> jax.Array:
        """Return `q W` with the first `split` outputs of each head, [T, N, I]."""
        h_CWNR = jnp.einsum("cwnh,crnh->cwnr", self.plan.gather(q_TNH), self._by_head()[..., : self.split])
        return self.plan.scatter(jnp.einsum("cwnr,cri->cwni", h_CWNR, self.plan.gather_matrices(self.pair.a)))

    def project_v(self, o_TNI: jax.Array) -> jax.Array:
        """Return `W o` with the other outputs of each head, [T, N, V]."""
        h_CWNR = jnp.einsum("cwni,cri->cwnr", self.plan.gather(o_TNI), self.plan.gather_matrices(self.pair.a))
        return self.plan.scatter(jnp.einsum("cwnr,crnv->cwnv", h_CWNR, self._by_head()[..., self.split :]))

    def _by_head(self) -> jax.Array:
        """Return the B matrices of each block, [C, R, N, O]."""
        b_CRO = self.plan.gather_matrices(self.pair.b)
        return b_CRO.reshape(*b_CRO.shape[:2], self.num_heads, -1)
