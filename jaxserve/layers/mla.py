"""Multi-head latent attention (MLA, arXiv:2405.04434, section 2.1).

Keys and values are cached as one latent vector that all heads share. In the absorbed form W_UK is folded into the
queries and W_UV into the results, so attention runs on the cached latent directly: one KV head of
`kv_lora_rank + qk_rope_head_dim` channels, whose value is the first `kv_lora_rank` channels of its key.

Dimension key: C latent channels, R rotated channels, H unrotated channels of a head's key, V channels of a head's
value.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.config import MlaConfig
from jaxserve.layers.args import DecoderArgs
from jaxserve.layers.context import HeadUpdates, LayerContext
from jaxserve.layers.kv_scales import kv_scales_param
from jaxserve.layers.linear import Linear
from jaxserve.layers.norm import RMSNorm
from kernels_pallas.grouped_matmul.api import HeadMatmul, HeadMatrices
from kernels_pallas.rope.api import Angles
from kernels_pallas.rope.xla.backend import rotate

# Epsilon of the norms inside MLA, independent of the model's `rms_norm_eps`.
_EPS = 1e-6


class KvBProj(Linear):
    """`kv_b_proj`: projects latent vectors to keys and values.

    It is never applied directly: either W_UK is folded into the queries and W_UV into the attention's result, or both
    compute the keys and values of whole prompts (`mla_prefill`).
    """

    absorbed_only = True
    dequantized = True

    def __init__(self, mla: MlaConfig, num_heads: int, **options: Any) -> None:
        out_size = num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        super().__init__(mla.kv_lora_rank, out_size, axes=("heads", None), bias=False, **options)
        self._mla = mla
        self.num_heads = num_heads

    @property
    def key_dim(self) -> int:
        """Number of rows of a head that project to its key; the other rows project to its value."""
        return self._mla.qk_nope_head_dim

    def updates(self, ctx: LayerContext) -> HeadUpdates | None:
        """Return the updates of the tokens' adapters in the absorbed form."""
        return ctx.lora.heads(self.path, self.key_dim, self.num_heads)

    def absorb(
        self, q_TNQ: jax.Array, q_TNR: jax.Array, matmul: HeadMatmul, updates: HeadUpdates | None = None
    ) -> jax.Array:
        """Convert queries of per-head keys to queries of the cached latent, [T, N, C + R].

        Args:
            q_TNQ: queries, of whose channels the first H, which are not rotated, are converted.
            q_TNR: their rotated channels.
            matmul: multiplies heads by their own matrices.
            updates: result of `updates`.
        """
        q_TNC = matmul(q_TNQ, self._head_matrices(0, self.key_dim), transposed=True)
        if updates is not None:
            q_TNC += updates.absorb(q_TNQ[..., : self.key_dim])
        return jnp.concatenate([q_TNC, q_TNR], axis=-1)

    def project_v(self, o_TNC: jax.Array, matmul: HeadMatmul, updates: HeadUpdates | None = None) -> jax.Array:
        """Project the result of attention over the cache to values, [T, N, V]."""
        o_TNV = matmul(o_TNC, self._head_matrices(self.key_dim, self._mla.v_head_dim))
        return o_TNV if updates is None else o_TNV + updates.project_v(o_TNC)

    def _head_matrices(self, first: int, number: int) -> HeadMatrices:
        matrices, layer, _ = self.stacked()
        return HeadMatrices(matrices.values_XOI, layer, self.key_dim + self._mla.v_head_dim, first, number)

    def by_head(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Return W_UK [N, H, C] and W_UV [N, V, C], which project a latent vector to keys and values."""
        mla = self._mla
        both = self.matrix(dtype).reshape(-1, mla.qk_nope_head_dim + mla.v_head_dim, mla.kv_lora_rank)
        return both[:, : mla.qk_nope_head_dim], both[:, mla.qk_nope_head_dim :]


class KvAProj(Linear):
    """`kv_a_proj_with_mqa`: projects activations to latent and rotated channels.

    Its outputs, 576 in DeepSeek's models, are no whole number of the tiles that kernels for quantised weights need.
    """

    dequantized = True


class MlaAttention(nnx.Module):
    """Projections around the attention backend; the MLA counterpart of `Attention`."""

    def __init__(self, args: DecoderArgs, mla: MlaConfig) -> None:
        c, a, dtype = args.config, mla, args.dtype
        quantization = c.quantized("attention")
        make = partial(Linear, dtype=dtype, quantization=quantization)
        q_size = c.num_q_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        if a.q_lora_rank is None:
            self.q_proj = make(c.hidden_size, q_size, axes=("heads", "hidden"), bias=False)
        else:
            self.q_a_proj = make(c.hidden_size, a.q_lora_rank, axes=(None, "hidden"), bias=c.attention_bias)
            self.q_a_norm = RMSNorm(a.q_lora_rank, eps=_EPS, dtype=dtype)
            self.q_b_proj = make(a.q_lora_rank, q_size, axes=("heads", None), bias=False)
        kv_size = a.kv_lora_rank + a.qk_rope_head_dim
        self.kv_a_proj = KvAProj(
            c.hidden_size, kv_size, axes=(None, "hidden"), bias=c.attention_bias, dtype=dtype, quantization=quantization
        )
        self.kv_a_norm = RMSNorm(a.kv_lora_rank, eps=_EPS, dtype=dtype)
        self.kv_b_proj = KvBProj(a, c.num_q_heads, dtype=dtype, quantization=quantization)
        o_size = c.num_q_heads * a.v_head_dim
        self.o_proj = make(o_size, c.hidden_size, axes=("hidden", "heads"), bias=c.attention_out_bias)
        self.cache_scales = kv_scales_param(args)
        self._latent = mla
        self._num_keys = args.num_kv_heads

    def sinks_N(self) -> None:
        """See `Attention`; MLA has no sinks."""

    def project(
        self, x_TD: jax.Array, ctx: LayerContext, *rope_TC: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries [T, N, C + R], keys [T, K, C + R] and values [T, K, C].

        Keys and values are the same for all K heads. In the `mha` form, queries are for per-head keys, [T, N, H + R].
        """
        a, num_tokens = self._latent, x_TD.shape[0]
        if a.q_lora_rank is None:
            projected = self.q_proj(x_TD, ctx)
        else:
            projected = self.q_b_proj(self.q_a_norm(self.q_a_proj(x_TD, ctx), ctx), ctx)
        q_TNQ = projected.reshape(num_tokens, -1, a.qk_nope_head_dim + a.qk_rope_head_dim)
        q_TNR = q_TNQ[..., a.qk_nope_head_dim :]
        kv_TS = self.kv_a_proj(x_TD, ctx)
        latent_T1C = self.kv_a_norm(kv_TS, ctx)[:, None]
        k_T1R = kv_TS[:, None, a.kv_lora_rank :]
        if rope_TC:
            q_TNR, k_T1R = (rotate(self._in_halves(x), Angles(*rope_TC)) for x in (q_TNR, k_T1R))
        key_T1S = jnp.concatenate([latent_T1C, k_T1R], axis=-1)
        key_TKS = jnp.broadcast_to(key_T1S, (num_tokens, self._num_keys, key_T1S.shape[-1]))
        if ctx.mla == "absorbed":
            q_TNS = self.kv_b_proj.absorb(q_TNQ, q_TNR, ctx.ops.head_matmul, self.kv_b_proj.updates(ctx))
        else:
            q_TNS = jnp.concatenate([q_TNQ[..., : a.qk_nope_head_dim], q_TNR], axis=-1)
        return q_TNS, key_TKS, key_TKS[..., : a.kv_lora_rank]

    def output(self, o_TNC: jax.Array, ctx: LayerContext) -> jax.Array:
        """[T, N, C] -> [T, D]; in the `mha` form, [T, N, V] -> [T, D]."""
        o_TNV = o_TNC
        if ctx.mla == "absorbed":
            o_TNV = self.kv_b_proj.project_v(o_TNC, ctx.ops.head_matmul, self.kv_b_proj.updates(ctx))
        return self.o_proj(o_TNV.reshape(o_TNV.shape[0], -1), ctx)

    def _in_halves(self, x: jax.Array) -> jax.Array:
        """Reorder interleaved pairs for `rotate`: first channels in one half, second channels in the other."""
        if not self._latent.interleaved:
            return x
        return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)
