"""Scales of an int8 KV cache: keys and values are divided by them before they are rounded.

Every channel of a head has its own scale, since a few channels of a key are many times larger than the others (KIVI,
arXiv:2402.02750, section 3.1). Keys' scales are folded into queries and values' scales into results, so attention
backends need none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.layers.args import DecoderArgs
from jaxserve.layers.linear import ParamOptions, param


class KvScales(NamedTuple):
    """The KV scales of a layer.

    Attributes:
        keys_KH: f32 scales of keys.
        values_KH: f32 scales of values, one per channel of a head's result.
    """

    keys_KH: jax.Array
    values_KH: jax.Array

    def shrink(self, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Multiply queries by the keys' scales and divide keys and values by theirs; keys and values become f32."""
        return (
            _times(q_TNH, self.keys_KH),
            k_TKH.astype(jnp.float32) / self.keys_KH,
            v_TKH.astype(jnp.float32) / self.values_KH,
        )

    def restore(self, o_TNH: jax.Array) -> jax.Array:
        """Multiply attention results by the values' scales."""
        return _times(o_TNH, self.values_KH)


def _times(x_TNH: jax.Array, scale_KH: jax.Array) -> jax.Array:
    """Multiply each query head by the scales of its KV head."""
    num_tokens, num_heads, head_dim = x_TNH.shape
    x_TKGH = x_TNH.reshape(num_tokens, scale_KH.shape[0], -1, head_dim).astype(jnp.float32)
    return (x_TKGH * scale_KH[:, None]).astype(x_TNH.dtype).reshape(num_tokens, num_heads, head_dim)


def kv_scales_param(args: DecoderArgs) -> nnx.Param[jax.Array] | None:
    """Create a layer's KV scales, if the cache has any; values that are a part of their keys have none of their own."""
    if not args.parallelism.kv_scales:
        return None
    shape = (2 if args.config.mla is None else 1, args.num_kv_heads, args.config.head_dim)
    return param(shape, jnp.dtype(jnp.float32), (None, "kv_heads", None), ParamOptions(loaded=False))


def kv_scales_of(param_2KH: Any, value_dim: int | None) -> KvScales | None:
    """Return the scales in a parameter, if any; `value_dim` is the size of values that are a part of their keys."""
    if param_2KH is None:
        return None
    scales_2KH: jax.Array = param_2KH[...]
    if value_dim is None:
        return KvScales(scales_2KH[0], scales_2KH[1])
    return KvScales(scales_2KH[0], scales_2KH[0, :, :value_dim])
