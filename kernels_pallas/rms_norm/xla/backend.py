"""RMSNorm in portable XLA."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.rms_norm.api import NormWeight


def rms_norm(x_TD: jax.Array, norm: NormWeight, added_TD: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """See `RmsNorm`; leading axes are arbitrary."""
    if added_TD is not None:
        x_TD = x_TD + added_TD
    x32 = x_TD[..., : norm.weight.stack.shape[1]].astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + norm.eps)
    return x_TD, (x32 * (norm.weight.slice().astype(jnp.float32) + norm.offset)).astype(x_TD.dtype)
