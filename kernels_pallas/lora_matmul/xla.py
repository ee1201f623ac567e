"""Low-rank updates in portable XLA: two products over the factors of all slots, masked in between.

It multiplies by every slot's factors and keeps a token's own. On a CPU that is faster than bringing each group of
tokens its factors: the products are small beside those of the layer, a gather of factors is not.

The compiler finds by itself how to split it over a mesh.

Dimension key: T tokens, S slots (slot s at s - 1), R rank, P = S * R, I inputs, O outputs.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.lora_matmul.api import Split


def lora_matmul(
    x_TI: jax.Array, a_SRI: jax.Array, b_SRO: jax.Array, slot_T: jax.Array, split: Split = None
) -> jax.Array:
    """See `LoraMatmul`."""
    del split
    a_PI = a_SRI.reshape(-1, a_SRI.shape[-1])
    h_TP = jnp.einsum("ti,pi->tp", x_TI, a_PI)
    return _expand(h_TP, b_SRO, slot_T)


def lora_embed(token_ids_T: jax.Array, a_SRI: jax.Array, b_SRO: jax.Array, slot_T: jax.Array) -> jax.Array:
    """[T, I]: row `token_ids_T` of A^T B of each token's slot; O are the ids."""
    h_SRT = b_SRO[:, :, token_ids_T]
    return _expand(h_SRT.reshape(-1, token_ids_T.shape[0]).T, a_SRI, slot_T)


def _expand(h_TP: jax.Array, b_SRO: jax.Array, slot_T: jax.Array) -> jax.Array:
    num_slots, rank, _ = b_SRO.shape
    own_TP = (slot_T[:, None] - 1) == jnp.repeat(jnp.arange(num_slots), rank)
    h_TP = jnp.where(own_TP, h_TP, jnp.zeros_like(h_TP))
    return jnp.einsum("tp,po->to", h_TP, b_SRO.reshape(-1, b_SRO.shape[-1]))
