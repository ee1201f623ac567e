"""Multi-head latent attention (MLA, arXiv:2405.04434, section 2.1).

A token is cached as one latent vector and one rotated key that all heads share. The matrices that would make keys and
values of each head are put into the queries and the results instead, so a step attends over what is cached as it is:
one key head of `kv_rank + rope_dim` numbers, the first `kv_rank` of which are its value.

Dimension key: C latent vector, R rotated numbers, H those of a head's key that are not, V a head's value.
"""

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.config import MlaConfig, ModelConfig
from jaxserve.layers.kv_scales import kv_scales_param
from jaxserve.layers.linear import Linear, RMSNorm
from jaxserve.layers.rope import apply_rope

# Of the norms inside, whatever the others have.
_EPS = 1e-6


class HeadUpdates(Protocol):
    """What adapters add where the expansion is taken apart."""

    def absorb(self, q_TNH: jax.Array) -> jax.Array:
        """To queries of what is cached, [T, N, C]."""
        ...

    def release(self, o_TNI: jax.Array) -> jax.Array:
        """To values, [T, N, V], of what attention gave [T, N, C]."""
        ...


class Expansion(Linear):
    """Makes keys and values of latent vectors; never applied as it is, but by queries and to results."""

    taken_apart = True

    def __init__(self, latent: MlaConfig, num_heads: int, **options: Any) -> None:
        a = latent
        super().__init__(a.kv_rank, num_heads * (a.key_dim + a.value_dim), axes=("heads", None), bias=False, **options)
        self._latent = latent
        self.num_heads = num_heads
        # Set while a step is traced.
        self.head_updates: HeadUpdates | None = None

    @property
    def key_dim(self) -> int:
        """Of a head's rows, those that make its key; the others make its value."""
        return self._latent.key_dim

    def absorb(self, q_TNQ: jax.Array) -> jax.Array:
        """Queries of heads' own keys, [T, N, H + R], as queries of what is cached, [T, N, C + R]."""
        q_TNH, q_TNR = q_TNQ[..., : self.key_dim], q_TNQ[..., self.key_dim :]
        keys_NHC, _ = self.by_head(q_TNH.dtype)
        q_TNC = jnp.einsum("tnh,nhc->tnc", q_TNH, keys_NHC)
        if self.head_updates is not None:
            q_TNC += self.head_updates.absorb(q_TNH)
        return jnp.concatenate([q_TNC, q_TNR], axis=-1)

    def release(self, o_TNC: jax.Array) -> jax.Array:
        """Values of what attention gave, [T, N, V]."""
        _, values_NVC = self.by_head(o_TNC.dtype)
        o_TNV = jnp.einsum("tnc,nvc->tnv", o_TNC, values_NVC)
        return o_TNV if self.head_updates is None else o_TNV + self.head_updates.release(o_TNC)

    def by_head(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """[N, H, C] and [N, V, C], which make keys and values of a latent vector."""
        a = self._latent
        both = self.matrix(dtype).reshape(-1, a.key_dim + a.value_dim, a.kv_rank)
        return both[:, : a.key_dim], both[:, a.key_dim :]


class MlaAttention(nnx.Module):
    """Projections around the attention backend; as `Attention`."""

    def __init__(self, config: ModelConfig, latent: MlaConfig, dtype: jnp.dtype) -> None:
        c, a = config, latent
        quantization = c.quantized("attention")
        make = partial(Linear, dtype=dtype, quantization=quantization)
        q_size = c.num_q_heads * (a.key_dim + a.rope_dim)
        if a.q_rank is None:
            self.q_proj = make(c.hidden_size, q_size, axes=("heads", "hidden"), bias=False)
        else:
            self.q_a_proj = make(c.hidden_size, a.q_rank, axes=(None, "hidden"), bias=c.attention_bias)
            self.q_a_norm = RMSNorm(a.q_rank, eps=_EPS, dtype=dtype)
            self.q_b_proj = make(a.q_rank, q_size, axes=("heads", None), bias=False)
        kv_size = a.kv_rank + a.rope_dim
        self.kv_a_proj = make(c.hidden_size, kv_size, axes=(None, "hidden"), bias=c.attention_bias)
        self.kv_a_norm = RMSNorm(a.kv_rank, eps=_EPS, dtype=dtype)
        self.kv_b_proj = Expansion(a, c.num_q_heads, dtype=dtype, quantization=quantization)
        o_size = c.num_q_heads * a.value_dim
        self.o_proj = make(o_size, c.hidden_size, axes=("hidden", "heads"), bias=c.attention_out_bias)
        self.cache_scales = kv_scales_param(c)
        self._latent = latent
        self._num_keys = c.num_kv_heads
        # Set while a step is traced: false where queries meet keys of their heads' own.
        self.absorbs = True

    def sinks_N(self) -> None:
        """See `Attention`; there are none."""

    def project(self, x_TD: jax.Array, *rope_TC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [T, N, C + R], and keys [T, K, C + R] and values [T, K, C] that are all the same for each of K.

        Queries of heads' own keys are [T, N, H + R].
        """
        a, num_tokens = self._latent, x_TD.shape[0]
        projected = self.q_proj(x_TD) if a.q_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x_TD)))
        q_TNQ = projected.reshape(num_tokens, -1, a.key_dim + a.rope_dim)
        q_TNH, q_TNR = q_TNQ[..., : a.key_dim], q_TNQ[..., a.key_dim :]
        kv_TS = self.kv_a_proj(x_TD)
        latent_T1C = self.kv_a_norm(kv_TS[:, : a.kv_rank])[:, None]
        k_T1R = kv_TS[:, None, a.kv_rank :]
        if rope_TC:
            q_TNR, k_T1R = (apply_rope(self._in_halves(x), *rope_TC) for x in (q_TNR, k_T1R))
        key_T1S = jnp.concatenate([latent_T1C, k_T1R], axis=-1)
        key_TKS = jnp.broadcast_to(key_T1S, (num_tokens, self._num_keys, key_T1S.shape[-1]))
        q_TNQ = jnp.concatenate([q_TNH, q_TNR], axis=-1)
        if self.absorbs:
            q_TNQ = self.kv_b_proj.absorb(q_TNQ)
        return q_TNQ, key_TKS, key_TKS[..., : a.kv_rank]

    def output(self, o_TNC: jax.Array) -> jax.Array:
        """[T, N, C] -> [T, D]; values of heads' own are [T, N, V]."""
        o_TNV = self.kv_b_proj.release(o_TNC) if self.absorbs else o_TNC
        return self.o_proj(o_TNV.reshape(o_TNV.shape[0], -1))

    def _in_halves(self, x: jax.Array) -> jax.Array:
        """Rotated pairs as `apply_rope` wants them: one of each in the first half, the other in the second."""
        if not self._latent.interleaved:
            return x
        return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)
