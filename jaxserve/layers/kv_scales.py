"""What keys and values are divided by before a cache of 8-bit integers rounds them.

Every number of a head has a factor of its own, since a few of a key's are many times larger than the others (KIVI,
arXiv:2402.02750, section 3.1). Queries take in the keys' factors and results the values', so what attends knows none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.layers.args import DecoderArgs
from jaxserve.layers.linear import param


class KvScales(NamedTuple):
    """A layer's factors.

    Attributes:
        keys_KH: f32.
        values_KH: f32, of all numbers of a result.
    """

    keys_KH: jax.Array
    values_KH: jax.Array

    def shrink(self, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries of what is cached, and keys and values to cache, those in f32."""
        return (
            _times(q_TNH, self.keys_KH),
            k_TKH.astype(jnp.float32) / self.keys_KH,
            v_TKH.astype(jnp.float32) / self.values_KH,
        )

    def restore(self, o_TNH: jax.Array) -> jax.Array:
        """Results in the values' own size."""
        return _times(o_TNH, self.values_KH)


def _times(x_TNH: jax.Array, scale_KH: jax.Array) -> jax.Array:
    """Each query head by its key head's factors."""
    num_tokens, num_heads, head_dim = x_TNH.shape
    x_TKGH = x_TNH.reshape(num_tokens, scale_KH.shape[0], -1, head_dim).astype(jnp.float32)
    return (x_TKGH * scale_KH[:, None]).astype(x_TNH.dtype).reshape(num_tokens, num_heads, head_dim)


def kv_scales_param(args: DecoderArgs) -> nnx.Param[jax.Array] | None:
    """A layer's KV scales if the cache has them: of keys, and of values where these are no part of their keys."""
    if not args.parallelism.kv_scales:
        return None
    shape = (2 if args.config.mla is None else 1, args.num_kv_heads, args.config.head_dim)
    return param(shape, jnp.dtype(jnp.float32), (None, "kv_heads", None), loaded=False)


def kv_scales_of(param_2KH: Any, value_dim: int | None) -> KvScales | None:
    """See `kv_scales_param`; `value_dim` is the size of values that are a part of their keys, or None."""
    if param_2KH is None:
        return None
    scales_2KH: jax.Array = param_2KH[...]
    if value_dim is None:
        return KvScales(scales_2KH[0], scales_2KH[1])
    return KvScales(scales_2KH[0], scales_2KH[0, :, :value_dim])
