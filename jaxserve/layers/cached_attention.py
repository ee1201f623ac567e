"""Attention calls, which connect a layer's projections to the attention backend."""

from typing import Any, Literal, NamedTuple, Protocol

import jax

from jaxserve.layers.kv_scales import kv_scales_of
from kernels_pallas.paged_attention.api import AttentionBackend, Cache, Plan


class AttentionCall(Protocol):
    """Attention of one step, shared by all layers with the same window."""

    @property
    def mla(self) -> Literal["absorbed", "mha"]:
        """The form of MLA for which queries must be projected; see `LayerContext`."""
        ...

    def attend(
        self,
        attention: Any,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Cache,
        layer: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """Write this step's keys and values, then attend.

        Args:
            attention: the layer's projections.
            q_TNH: queries.
            k_TKH: new keys.
            v_TKH: new values.
            cache: see `AttentionBackend`.
            layer: i32 scalar, index of the layer.

        Returns:
            o_TNH as input of the output projection, and the updated cache.
        """
        ...


class PagedAttentionCall(NamedTuple):
    """Attention over the paged cache.

    Attributes:
        backend: attention backend, configured with the window.
        plan: the backend's plan of the step.
        mla: see `LayerContext`.
    """

    backend: AttentionBackend
    plan: Plan
    mla: Literal["absorbed", "mha"] = "absorbed"

    def attend(
        self,
        attention: Any,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Cache,
        layer: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """See `AttentionCall.attend`."""
        scales = kv_scales_of(attention.cache_scales, self.backend.config.value_dim)
        if scales is not None:
            q_TNH, k_TKH, v_TKH = scales.shrink(q_TNH, k_TKH, v_TKH)
        o_TNH, cache = self.backend.attend(q_TNH, k_TKH, v_TKH, cache, layer, self.plan, attention.sinks_N())
        return o_TNH if scales is None else scales.restore(o_TNH), cache
