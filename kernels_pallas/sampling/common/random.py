"""Counter-based random bits: Threefry-2x32 with 20 rounds (Salmon et al., SC 2011).

The key is a request's seed and the counter is (position, token id), so the noise has no state: the noise of any subset
of a row's tokens can be computed anywhere, in any order, with the same bits. Everything is elementwise, so the same
function runs in XLA and inside a kernel.
"""

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry2x32(key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Encrypt a u32 counter pair under a u32 key pair; arguments broadcast against each other."""
    k0, k1 = key
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(_PARITY))
    x0, x1 = counter[0] + keys[0], counter[1] + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = (x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation))
            x1 = x1 ^ x0
        x0 = x0 + keys[(block + 1) % 3]
        x1 = x1 + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return x0, x1


def gumbel(key: tuple[jax.Array, jax.Array], position: jax.Array, token: jax.Array) -> jax.Array:
    """Return f32 standard Gumbel noise of each (u32 seed halves, u32 position, u32 token id); arguments broadcast."""
    bits, _ = threefry2x32(key, (position, token))
    # 23 bits plus a half: the uniform is exact in f32 and never 0 or 1. Kernels can convert i32 to f32, hence the cast.
    uniform = ((bits >> jnp.uint32(9)).astype(jnp.int32).astype(jnp.float32) + jnp.float32(0.5)) * jnp.float32(2**-23)
    return -jnp.log(-jnp.log(uniform))


def gumbel_noise(seed_B2: jax.Array, position_B: jax.Array, token_BJ: jax.Array) -> jax.Array:
    """Return standard Gumbel noise, f32[B, J], for each (seed, position, token id)."""
    key = (seed_B2[:, 0, None], seed_B2[:, 1, None])
    return gumbel(key, position_B[:, None].astype(jnp.uint32), token_BJ.astype(jnp.uint32))
