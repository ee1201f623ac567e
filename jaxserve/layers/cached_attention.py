"""How a layer of a step attends: between its projections and the attention backend."""

from typing import Any, NamedTuple, Protocol

import jax

from jaxserve.layers.kv_scales import kv_scales_of
from kernels_pallas.paged_attention.api import AttentionBackend, Cache, Plan


class Attend(Protocol):
    """Made once a step, for all layers of a window."""

    def attach(self, attention: Any) -> None:
        """Tell the layer's projections what is wanted of them."""
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
            k_TKH: keys.
            v_TKH: values.
            cache: see `AttentionBackend`.
            layer: i32 scalar.

        Returns:
            o_TNH as the projections take it, and the cache.
        """
        ...


class OverCache(NamedTuple):
    """Over what is cached, as it is.

    Attributes:
        backend: with the window.
        plan: of the step.
    """

    backend: AttentionBackend
    plan: Plan

    def attach(self, attention: Any) -> None:
        """As they are."""

    def attend(
        self,
        attention: Any,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Cache,
        layer: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """See `Attend.attend`."""
        scales = kv_scales_of(attention.cache_scales, self.backend.config.value_dim)
        if scales is not None:
            q_TNH, k_TKH, v_TKH = scales.shrink(q_TNH, k_TKH, v_TKH)
        o_TNH, cache = self.backend.attend(q_TNH, k_TKH, v_TKH, cache, layer, self.plan, attention.sinks_N())
        return o_TNH if scales is None else scales.restore(o_TNH), cache
