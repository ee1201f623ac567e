"""Rotary position embedding in portable XLA."""

import jax
import jax.numpy as jnp

from kernels_pallas.rms_norm.xla.backend import rms_norm
from kernels_pallas.rope.api import Angles, HeadNorms


def rope(
    q_TNH: jax.Array, k_TKH: jax.Array, angles: Angles, norms: HeadNorms | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `Rope`."""
    if norms is not None:
        q_TNH, k_TKH = (rms_norm(x, norm)[1] for x, norm in zip((q_TNH, k_TKH), norms, strict=True))
    return rotate(q_TNH, angles), rotate(k_TKH, angles)


def rotate(x_TNH: jax.Array, angles: Angles) -> jax.Array:
    """Rotate each head, pairing its first half with its second, in f32; return x's dtype."""
    first, second = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = angles.cos_TC[:, None], angles.sin_TC[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_TNH.dtype)
