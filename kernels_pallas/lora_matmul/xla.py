"""Low-rank updates in portable XLA: two products over the factors of all slots, masked in between.

It multiplies by every slot's factors and keeps a token's own. On a CPU that is faster than bringing each group of
tokens its factors: the products are small beside those of the layer, a gather of factors is not.

The compiler finds by itself how to split it over a mesh.

Dimension key: T tokens, S slots (slot s at s - 1), R rank, I inputs, O outputs, J = modules with the same inputs * R.
"""

import jax
import jax.numpy as jnp


class XlaLora:
    """A `LoraMatmul`."""

    def plan(self, slot_T: jax.Array, num_slots: int) -> jax.Array:
        """Whether a slot is a token's own, bool[T, S]."""
        return slot_T[:, None] == jnp.arange(1, num_slots + 1)

    def shrink(self, x_TI: jax.Array, a_SJI: jax.Array, plan: jax.Array, *, split: bool = False) -> jax.Array:
        """See `LoraMatmul`; [T, S, J], of all slots."""
        del plan, split
        num_slots, joint_rank, num_inputs = a_SJI.shape
        h_TP = jnp.einsum("ti,pi->tp", x_TI, a_SJI.reshape(-1, num_inputs))
        return h_TP.reshape(-1, num_slots, joint_rank)

    def expand(
        self, h: jax.Array, b_SRO: jax.Array, plan: jax.Array, *, member: int = 0, split: bool = False
    ) -> jax.Array:
        """See `LoraMatmul`."""
        del split
        num_slots, rank, num_outputs = b_SRO.shape
        h_TSR = h[:, :, member * rank : (member + 1) * rank]
        h_TSR = jnp.where(plan[:, :, None], h_TSR, jnp.zeros_like(h_TSR))
        return jnp.einsum("tp,po->to", h_TSR.reshape(-1, num_slots * rank), b_SRO.reshape(-1, num_outputs))


def lora_embed(token_ids_T: jax.Array, a_SRI: jax.Array, b_SRO: jax.Array, slot_T: jax.Array) -> jax.Array:
    """[T, I]: row `token_ids_T` of A^T B of each token's slot; O are the ids."""
    lora = XlaLora()
    h_TSR = b_SRO[:, :, token_ids_T].transpose(2, 0, 1)
    return lora.expand(h_TSR, a_SRI, lora.plan(slot_T, a_SRI.shape[0]))
