"""The attention call of a layer, between its projections and the attention backend."""

from typing import Any, Literal, NamedTuple, Protocol

import jax

from jaxserve.layers.kv_scales import kv_scales_of
from kernels_pallas.paged_attention.api import AttentionBackend, Cache, Plan


class AttentionCall(Protocol):
    """Attention of one step; made once for all layers that have the same window."""

    @property
    def mla(self) -> Literal["absorbed", "mha"]:
        """The form of MLA in which it takes queries; see `LayerContext`."""
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
            layer: i32 scalar, the index of the layer.

        Returns:
            o_TNH as the output projection takes it, and the updated cache.
        """
        ...


class PagedAttentionCall(NamedTuple):
    """Attention over the paged cache.

    Attributes:
        backend: the backend, with the window.
        plan: the backend's metadata of the step.
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
