"""Grouped-query attention around the attention backend: projections, norms and rotary embedding."""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.config import ModelConfig
from jaxserve.layers.args import DecoderArgs
from jaxserve.layers.context import LayerContext
from jaxserve.layers.kv_scales import kv_scales_param
from jaxserve.layers.linear import Linear, apply_group, param
from jaxserve.layers.norm import RMSNorm
from kernels_pallas.rope.api import Angles, HeadNorms


class Attention(nnx.Module):
    """Projections around the attention backend."""

    lora_groups: ClassVar[tuple[tuple[str, ...], ...]] = (("q_proj", "k_proj", "v_proj"),)

    def __init__(self, args: DecoderArgs) -> None:
        c, dtype = args.config, args.dtype
        q_size, kv_size = c.num_q_heads * c.head_dim, args.num_kv_heads * c.head_dim
        make = partial(Linear, dtype=dtype, quantization=c.quantized("attention"))
        self.q_proj = make(c.hidden_size, q_size, axes=("heads", "hidden"), bias=c.attention_bias)
        self.k_proj = make(c.hidden_size, kv_size, axes=("kv_heads", "hidden"), bias=c.attention_bias)
        self.v_proj = make(c.hidden_size, kv_size, axes=("kv_heads", "hidden"), bias=c.attention_bias)
        self.o_proj = make(q_size, c.hidden_size, axes=("hidden", "heads"), bias=c.attention_out_bias)
        self.q_norm = self._norm(c, "heads", c.num_q_heads, dtype)
        self.k_norm = self._norm(c, "kv_heads", args.num_kv_heads, dtype)
        self.sinks = param((c.num_q_heads,), dtype, ("heads",)) if c.attention_sinks else None
        self.cache_scales = kv_scales_param(args)
        self._qk_norm = c.qk_norm
        self._head_dim = c.head_dim

    def sinks_N(self) -> jax.Array | None:
        """Return an extra score per head that takes probability but has no value, f32, or None."""
        return None if self.sinks is None else self.sinks[...].astype(jnp.float32)

    def _norm(self, config: ModelConfig, axis: str, num_heads: int, dtype: jnp.dtype) -> Any:
        """Return the norm of queries or keys, if any; a norm over whole projections is sharded like the heads."""
        c = config
        if c.qk_norm is None:
            return None
        size, axes = (c.head_dim, (None,)) if c.qk_norm == "head" else (num_heads * c.head_dim, (axis,))
        return RMSNorm(size, eps=c.rms_norm_eps, dtype=dtype, offset=c.norm_offset, axes=axes)

    def project(
        self, x_TD: jax.Array, ctx: LayerContext, *rope_TC: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries [T, N, H], keys [T, K, H] and values [T, K, H]; without `rope_TC`, nothing is rotated."""
        heads = (x_TD.shape[0], -1, self._head_dim)
        q_TM, k_TM, v_TM = apply_group((self.q_proj, self.k_proj, self.v_proj), x_TD, ctx)
        v_TKH = v_TM.reshape(heads)
        if self._qk_norm == "projection":
            q_TM, k_TM = self.q_norm.by_xla(q_TM), self.k_norm.by_xla(k_TM)
        q_TNH, k_TKH = q_TM.reshape(heads), k_TM.reshape(heads)
        norms = HeadNorms(self.q_norm.weights(), self.k_norm.weights()) if self._qk_norm == "head" else None
        if rope_TC:
            q_TNH, k_TKH = ctx.ops.rope(q_TNH, k_TKH, Angles(*rope_TC), norms)
        elif norms is not None:
            q_TNH, k_TKH = self.q_norm.by_xla(q_TNH), self.k_norm.by_xla(k_TKH)
        return q_TNH, k_TKH, v_TKH

    def output(self, o_TNH: jax.Array, ctx: LayerContext) -> jax.Array:
        """[T, N, H] -> [T, D]."""
        return self.o_proj(o_TNH.reshape(o_TNH.shape[0], -1), ctx)
