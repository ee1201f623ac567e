"""Paged attention in portable XLA: the path on CPU, and on any device without a native kernel.

Cost scales with the live tokens, not with the configured context: rows that run one token (decode) become a list of
items, longer rows (prefill) tiles of queries. Few enough pages are gathered at a time to stay in a core's cache:
gathering whole contexts first would cost more than the attention itself.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas.kv_update.xla.backend import write_tokens
from kernels_pallas.paged_attention.api import AttentionConfig, AttentionMeta, Cache, CacheSpec, writing
from kernels_pallas.paged_attention.common.head_shards import head_major_spec, over_heads
from kernels_pallas.paged_attention.common.partial_softmax import MASKED
from kernels_pallas.paged_attention.xla.decode import DecodeItems, attend_decode, plan_decode
from kernels_pallas.paged_attention.xla.pages import LayerInputs, from_stored, stored_dtype, to_stored
from kernels_pallas.paged_attention.xla.prefill import QueryTiles, attend_tiles, plan_tiles

# Tokens per tile: large tiles waste less per query, small ones less on short rows.
_TILE_SIZES = (128, 32)
_INVARIANT_TILE_SIZES = (16,)


class XlaPlan(NamedTuple):
    """Work of one step: decode items, None in batch-invariant mode, and query tiles by size, the largest first."""

    meta: AttentionMeta
    items: DecodeItems | None
    tiles: tuple[QueryTiles, ...]


class XlaAttention:
    """Backend `xla`. Heads are split over the devices of a replica; each shard attends independently."""

    def __init__(self, config: AttentionConfig, mesh: Mesh) -> None:
        self.config = config
        self.max_table_entries: int | None = None
        self._mesh = mesh

    def cache_spec(self) -> dict[str, CacheSpec]:
        """Return the specs of separate keys and values in head-major pages: batched products need no transpose."""
        return head_major_spec(dataclasses.replace(self.config, dtype=stored_dtype(self.config)))

    def unpack(self, arrays: Cache) -> tuple[jax.Array, ...]:
        """Return the arrays in the cache's dtype: keys and values are stored separately."""
        return tuple(from_stored(array, self.config) for array in arrays.values())

    def pack(self, k: jax.Array, v: jax.Array) -> Cache:
        """The inverse of `unpack`."""
        return {name: to_stored(x, self.config) for name, x in zip(self.cache_spec(), (k, v), strict=False)}

    def writer(self) -> "XlaAttention":
        """See `AttentionBackend.writer`."""
        return XlaAttention(writing(self.config), self._mesh)

    def decode_bytes(self, kv_lens: list[int], num_rows: int) -> int:
        """See `AttentionBackend.decode_bytes`; this backend has no kernel."""
        del kv_lens, num_rows
        return 0

    def plan(self, meta: AttentionMeta) -> XlaPlan:
        """List the decode items and the query tiles of a step."""
        if self.config.batch_invariant:
            items, first_row = None, jnp.int32(0)
        else:
            items, first_row = plan_decode(self.config, meta), meta.distribution_2[0]
        return XlaPlan(meta, items, plan_tiles(meta, first_row, self._tile_sizes(meta)))

    def _tile_sizes(self, meta: AttentionMeta) -> tuple[int, ...]:
        num_rows, num_tokens = meta.kv_lens_B.shape[0], meta.positions_T.shape[0]
        # Decode and prefill products have different shapes and so round differently: batch-invariant mode sends
        # every row through tiles of one size.
        if self.config.batch_invariant:
            return _INVARIANT_TILE_SIZES
        if num_tokens == num_rows:
            return ()
        return tuple(size for size in _TILE_SIZES if size <= num_tokens) or _TILE_SIZES[-1:]

    def attend(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Cache,
        layer: jax.Array,
        plan: XlaPlan,
        sinks_N: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """See `AttentionBackend.attend`."""
        if sinks_N is None:
            # -inf would give 0 * inf for an empty row; a sink of `MASKED` adds exactly 0.
            sinks_N = jnp.full(q_TNH.shape[1], MASKED, jnp.float32)
        return over_heads(self._attend_shard, self._mesh, cache)(q_TNH, k_TKH, v_TKH, cache, layer, plan, sinks_N)

    def _attend_shard(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Cache,
        layer: jax.Array,
        plan: XlaPlan,
        sinks_N: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        c = self.config
        q_TKGH = q_TNH.reshape(q_TNH.shape[0], k_TKH.shape[1], -1, c.head_dim)
        first_page = layer * c.num_pages
        slot_T = plan.meta.slot_mapping_T
        # Padding tokens point past a layer's pool. Their page is set past the last layer, so that they are dropped.
        page_T = jnp.where(
            slot_T < c.num_pages * c.page_size, slot_T // c.page_size + first_page, c.num_layers * c.num_pages
        )
        new = self.pack(k_TKH, v_TKH)
        cache = {name: write_tokens(cache[name], page_T, slot_T % c.page_size, x) for name, x in new.items()}
        layer_inputs = LayerInputs(
            q_TKGH=q_TKGH.astype(c.compute_dtype),
            keys_PKSH=cache["k"],
            values_PKSH=cache.get("v"),
            first_page=first_page,
            sinks_KG=sinks_N.reshape(k_TKH.shape[1], -1),
        )
        if plan.items is None:
            o_TKGH = jnp.zeros((*layer_inputs.q_TKGH.shape[:3], c.out_dim), jnp.float32)
        else:
            o_TKGH = attend_decode(c, layer_inputs, plan.items)
        # Smallest first: the tail of a row's last tile reaches into the next rows, whose tiles overwrite it later.
        for size, tiles in reversed(list(zip(self._tile_sizes(plan.meta), plan.tiles, strict=True))):
            o_TKGH = attend_tiles(c, layer_inputs, plan.meta, tiles, size, o_TKGH)
        return o_TKGH.reshape(*q_TNH.shape[:2], c.out_dim).astype(q_TNH.dtype), cache
