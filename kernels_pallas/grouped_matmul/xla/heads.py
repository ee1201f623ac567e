"""Products of heads with their own matrices in portable XLA."""

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.api import HeadMatrices


def multiply_heads(x_TNJ: jax.Array, matrices: HeadMatrices, *, transposed: bool = False) -> jax.Array:
    """See `HeadMatmul`."""
    w_NRC = matrices.by_head()
    equation, num_inputs = ("tnr,nrc->tnc", matrices.number) if transposed else ("tnc,nrc->tnr", w_NRC.shape[2])
    return jnp.einsum(equation, x_TNJ[..., :num_inputs], w_NRC)
