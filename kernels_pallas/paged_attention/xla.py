"""Paged attention in portable XLA: the path on CPU, and on any device without a kernel of its own.

Cost follows the live tokens, not the configured context: rows that run one token (decode) become a flat list
of (row, page) items taken a fixed number at a time; longer rows (prefill) become tiles of queries, each of which
walks its own pages up to the causal limit. Both merge partial softmaxes as FlashAttention does
(arXiv:2205.14135). Gathered pages are small enough to stay in a core's cache: gathering whole contexts first
costs more than the attention itself.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.paged_attention.api import AttentionConfig, AttentionMeta, Cache, CacheSpec

# Finite, so that differences of masked maxima are 0 and not NaN.
_MASKED = -1e30
_ITEM_TOKENS = 8192
_CHUNK_TOKENS = 512


class XlaPlan(NamedTuple):
    """Work lists of one step. I decode items, Q query tiles."""

    meta: AttentionMeta
    num_items: jax.Array  # i32
    item_row_I: jax.Array  # i32; rows are ascending
    item_page_I: jax.Array  # i32, page id within a layer
    item_start_I: jax.Array  # i32, position of the page's first key
    num_tiles: jax.Array  # i32
    tile_row_Q: jax.Array  # i32
    tile_token_Q: jax.Array  # i32, first token of the tile


class _Partial(NamedTuple):
    """A softmax in progress: running maximum, sum of weights, weighted values."""

    top: jax.Array
    total: jax.Array
    out: jax.Array


class XlaAttention:
    """Backend `xla`. Heads are split over the mesh axis `model`; every shard attends on its own."""

    def __init__(self, config: AttentionConfig, mesh: Mesh) -> None:
        self.config = config
        self._mesh = mesh

    def cache_spec(self) -> dict[str, CacheSpec]:
        """Keys and values apart, head-major pages: the layout whose batched products need no transpose."""
        c = self.config
        shape = (c.num_layers * c.num_pages, c.num_kv_heads, c.page_size, c.head_dim)
        spec = CacheSpec(shape, c.dtype, P(None, "model", None, None))
        return {"k": spec, "v": spec}

    def plan(self, meta: AttentionMeta) -> XlaPlan:
        """List the decode items and the query tiles of a step."""
        c = self.config
        num_rows, num_tokens = meta.kv_lens_B.shape[0], meta.positions_T.shape[0]
        row_B = jnp.arange(num_rows, dtype=jnp.int32)
        q_lens_B = jnp.diff(meta.cu_q_lens_B1)
        # Decode and prefill products have different shapes and so round differently: batch-invariant mode
        # sends every row through the tiles.
        num_decode = jnp.int32(0) if c.batch_invariant else meta.distribution_2[0]

        first_page_B = jnp.zeros_like(meta.kv_lens_B)
        if c.window is not None:
            first_page_B = jnp.maximum(meta.kv_lens_B - c.window, 0) // c.page_size
        pages_B = -(-meta.kv_lens_B // c.page_size) - first_page_B
        pages_B = jnp.where(row_B < num_decode, pages_B, 0)
        item_row_I, item_index_I, num_items = _expand(pages_B, num_rows * meta.page_table_BM.shape[1])
        item_index_I += first_page_B[item_row_I]

        tile = self._tile_size(num_tokens)
        tiles_B = jnp.where((row_B >= num_decode) & (row_B < meta.distribution_2[1]), -(-q_lens_B // tile), 0)
        tile_row_Q, tile_index_Q, num_tiles = _expand(tiles_B, num_tokens // tile + min(num_rows, num_tokens) + 1)
        return XlaPlan(
            meta=meta,
            num_items=num_items,
            item_row_I=item_row_I,
            item_page_I=meta.page_table_BM[item_row_I, item_index_I],
            item_start_I=item_index_I * c.page_size,
            num_tiles=num_tiles,
            tile_row_Q=tile_row_Q,
            tile_token_Q=meta.cu_q_lens_B1[tile_row_Q] + tile_index_Q * tile,
        )

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
        heads, pages = P(None, "model", None), P(None, "model", None, None)
        if sinks_N is None:
            # -inf would make 0 * inf of an empty row; a masked sink adds exactly nothing.
            sinks_N = jnp.full(q_TNH.shape[1], _MASKED, jnp.float32)
        local = jax.shard_map(
            self._attend_shard,
            mesh=self._mesh,
            in_specs=(heads, heads, heads, {"k": pages, "v": pages}, P(), P(), P("model")),
            out_specs=(heads, {"k": pages, "v": pages}),
            check_vma=False,
        )
        return local(q_TNH, k_TKH, v_TKH, cache, layer, plan, sinks_N)

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
        first_page = layer * c.num_pages
        slots_T = plan.meta.slot_mapping_T
        # Padding tokens point past the pool; past the last layer as well, they are dropped.
        page_T = jnp.where(
            slots_T < c.num_pages * c.page_size, slots_T // c.page_size + first_page, c.num_layers * c.num_pages
        )
        cache = {
            "k": cache["k"].at[page_T, :, slots_T % c.page_size].set(k_TKH.astype(c.dtype), mode="drop"),
            "v": cache["v"].at[page_T, :, slots_T % c.page_size].set(v_TKH.astype(c.dtype), mode="drop"),
        }
        num_kv_heads = k_TKH.shape[1]
        q_TKGH = q_TNH.reshape(q_TNH.shape[0], num_kv_heads, -1, c.head_dim).astype(c.dtype)
        sinks_KG = sinks_N.reshape(num_kv_heads, -1)
        o_TKGH = self._decode(q_TKGH, cache, first_page, plan, sinks_KG)
        o_TKGH = self._prefill(q_TKGH, cache, first_page, plan, sinks_KG, o_TKGH)
        return o_TKGH.reshape(q_TNH.shape).astype(q_TNH.dtype), cache

    def _scores(self, equation: str, q: jax.Array, k: jax.Array) -> jax.Array:
        scores = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32) * self.config.scale
        if self.config.soft_cap is not None:
            scores = self.config.soft_cap * jnp.tanh(scores / self.config.soft_cap)
        return scores

    def _tile_size(self, num_tokens: int) -> int:
        return 16 if self.config.batch_invariant or num_tokens < 64 else 64

    def _decode(
        self, q_TKGH: jax.Array, cache: Cache, first_page: jax.Array, plan: XlaPlan, sinks_KG: jax.Array
    ) -> jax.Array:
        """Rows of one token: token b belongs to row b. Returns f32 [T, K, G, H]."""
        c = self.config
        num_rows = plan.meta.kv_lens_B.shape[0]
        num_items = max(1, min(max(num_rows, 8), 64, _ITEM_TOKENS // c.page_size, plan.item_row_I.shape[0]))
        q_BKGH = q_TKGH[:num_rows]
        shape = (num_rows + num_items, *q_TKGH.shape[1:])
        state = _Partial(
            jnp.broadcast_to(sinks_KG, shape[:-1]),
            jnp.ones(shape[:-1], jnp.float32),
            jnp.zeros(shape, jnp.float32),
        )

        def body(index: jax.Array, state: _Partial) -> _Partial:
            # The last chunk is moved back into the list; the items it repeats are masked out.
            start = jnp.minimum(index * num_items, plan.item_row_I.shape[0] - num_items)
            row_E, page_E, position_E = (
                lax.dynamic_slice_in_dim(array, start, num_items)
                for array in (plan.item_row_I, plan.item_page_I, plan.item_start_I)
            )
            item_E = start + jnp.arange(num_items)
            live_E = (item_E >= index * num_items) & (item_E < plan.num_items)
            position_ES = position_E[:, None] + jnp.arange(c.page_size)
            live_ES = live_E[:, None] & (position_ES < plan.meta.kv_lens_B[row_E][:, None])
            if c.window is not None:
                live_ES &= position_ES >= (plan.meta.kv_lens_B[row_E] - c.window)[:, None]
            k_EKSH = _take_pages(cache["k"], first_page + page_E)
            # Unused slots may hold NaN, and 0 * NaN is NaN.
            v_EKSH = jnp.where(live_ES[:, None, :, None], cache["v"][first_page + page_E], 0)
            scores_EKGS = self._scores("ekgh,eksh->ekgs", q_BKGH[row_E], k_EKSH)
            part = _softmax_part(scores_EKGS, live_ES[:, None, None, :])
            out_EKGH = jnp.einsum(
                "ekgs,eksh->ekgh", part.out.astype(c.dtype), v_EKSH, preferred_element_type=jnp.float32
            )
            return _merge_rows(state, part._replace(out=out_EKGH), row_E)

        state = lax.fori_loop(0, -(-plan.num_items // num_items), body, state)
        o_BKGH = state.out[:num_rows] / state.total[:num_rows, ..., None]
        return jnp.pad(o_BKGH, ((0, q_TKGH.shape[0] - num_rows), (0, 0), (0, 0), (0, 0)))

    def _prefill(
        self,
        q_TKGH: jax.Array,
        cache: Cache,
        first_page: jax.Array,
        plan: XlaPlan,
        sinks_KG: jax.Array,
        o_TKGH: jax.Array,
    ) -> jax.Array:
        """Rows of several tokens, tile by tile, over what `_decode` returned."""
        c = self.config
        num_tokens = q_TKGH.shape[0]
        tile = self._tile_size(num_tokens)
        chunk = max(1, _CHUNK_TOKENS // c.page_size)
        meta = plan.meta
        padding = ((0, tile), (0, 0), (0, 0), (0, 0))
        q_TKGH = jnp.pad(q_TKGH, padding)
        table_BM = jnp.pad(meta.page_table_BM, ((0, 0), (0, chunk)))

        def attend_tile(index: jax.Array, o_TKGH: jax.Array) -> jax.Array:
            row, token = plan.tile_row_Q[index], plan.tile_token_Q[index]
            end = meta.cu_q_lens_B1[row + 1]
            position_t = meta.kv_lens_B[row] - end + token + jnp.arange(tile)
            q_tKGH = lax.dynamic_slice_in_dim(q_TKGH, token, tile)
            # Keys that the last live token of the tile can see.
            kv_len = meta.kv_lens_B[row] - end + jnp.minimum(token + tile, end)
            state = _Partial(
                jnp.broadcast_to(sinks_KG[:, None], (sinks_KG.shape[0], tile, sinks_KG.shape[1])),
                jnp.ones((sinks_KG.shape[0], tile, sinks_KG.shape[1]), jnp.float32),
                jnp.zeros((sinks_KG.shape[0], tile, sinks_KG.shape[1], c.head_dim), jnp.float32),
            )

            def body(index: jax.Array, state: _Partial) -> _Partial:
                page_W = first_page + lax.dynamic_slice(table_BM, (row, index * chunk), (1, chunk))[0]
                position_s = index * chunk * c.page_size + jnp.arange(chunk * c.page_size)
                live_ts = (position_s <= position_t[:, None]) & (position_s < kv_len)
                if c.window is not None:
                    live_ts &= position_s > position_t[:, None] - c.window
                k_KsH = _rows_of_pages(cache["k"][page_W])
                v_KsH = jnp.where((position_s < kv_len)[:, None], _rows_of_pages(cache["v"][page_W]), 0)
                scores_KtGs = self._scores("tkgh,ksh->ktgs", q_tKGH, k_KsH)
                part = _softmax_part(scores_KtGs, live_ts[None, :, None, :])
                out_KtGH = jnp.einsum(
                    "ktgs,ksh->ktgh", part.out.astype(c.dtype), v_KsH, preferred_element_type=jnp.float32
                )
                return _merge(state, part._replace(out=out_KtGH))

            first = 0
            if c.window is not None:
                first = jnp.maximum(position_t[0] + 1 - c.window, 0) // (chunk * c.page_size)
            state = lax.fori_loop(first, -(-kv_len // (chunk * c.page_size)), body, state)
            o_tKGH = jnp.moveaxis(state.out / state.total[..., None], 0, 1)
            # A tail that reaches into the next row is overwritten by that row's own tile, which comes later.
            return lax.dynamic_update_slice_in_dim(o_TKGH, o_tKGH, token, 0)

        return lax.fori_loop(0, plan.num_tiles, attend_tile, jnp.pad(o_TKGH, padding))[:num_tokens]


def _expand(counts_B: jax.Array, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """List (row, index within the row) for `counts_B` entries of each row, padded to `length`; and their number."""
    ends_B = jnp.cumsum(counts_B, dtype=jnp.int32)
    item_I = jnp.arange(length, dtype=jnp.int32)
    row_I = jnp.minimum(jnp.searchsorted(ends_B, item_I, side="right").astype(jnp.int32), counts_B.shape[0] - 1)
    index_I = jnp.where(item_I < ends_B[-1], item_I - (ends_B - counts_B)[row_I], 0)
    return row_I, index_I, ends_B[-1]


def _take_pages(pages_PKSH: jax.Array, page_E: jax.Array) -> jax.Array:
    """Gather whole pages as flat rows: XLA on CPU copies those three times faster than pages of four axes.

    The barrier keeps it from undoing the reshape.
    """
    flat_EF = pages_PKSH.reshape(pages_PKSH.shape[0], -1).at[page_E].get(mode="promise_in_bounds")
    return lax.optimization_barrier(flat_EF).reshape(-1, *pages_PKSH.shape[1:])


def _rows_of_pages(pages_WKSH: jax.Array) -> jax.Array:
    num_kv_heads, head_dim = pages_WKSH.shape[1], pages_WKSH.shape[3]
    return jnp.moveaxis(pages_WKSH, 1, 0).reshape(num_kv_heads, -1, head_dim)


def _softmax_part(scores: jax.Array, live: jax.Array) -> _Partial:
    """Maximum, sum and weights (in `out`) of scores along the last axis; masked entries weigh 0."""
    scores = jnp.where(live, scores, _MASKED)
    top = jnp.max(scores, axis=-1)
    weights = jnp.where(live, jnp.exp(scores - top[..., None]), 0.0)
    return _Partial(top, jnp.sum(weights, axis=-1), weights)


def _merge(state: _Partial, part: _Partial) -> _Partial:
    top = jnp.maximum(state.top, part.top)
    old, new = jnp.exp(state.top - top), jnp.exp(part.top - top)
    return _Partial(
        top,
        state.total * old + part.total * new,
        state.out * old[..., None] + part.out * new[..., None],
    )


def _merge_rows(state: _Partial, part: _Partial, row_E: jax.Array) -> _Partial:
    """Merge items into their rows. Rows ascend, so E items touch at most E consecutive rows."""
    num_items = row_E.shape[0]
    first = row_E[0]
    take = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=num_items)
    put = partial(lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
    local_E = row_E - first
    mine_RE = local_E[None, :] == jnp.arange(num_items)[:, None]
    tops_REKG = jnp.where(mine_RE[:, :, None, None], part.top[None], _MASKED)
    old_top_RKG = take(state.top)
    top_RKG = jnp.maximum(old_top_RKG, jnp.max(tops_REKG, axis=1))
    old_RKG = jnp.exp(old_top_RKG - top_RKG)
    weight_EKG = jnp.exp(part.top - top_RKG[local_E])
    sum_rows = partial(_sum_rows, mine_RE.astype(jnp.float32))
    total_RKG = take(state.total) * old_RKG + sum_rows(part.total * weight_EKG)
    out_RKGH = take(state.out) * old_RKG[..., None] + sum_rows(part.out * weight_EKG[..., None])
    return _Partial(put(state.top, top_RKG), put(state.total, total_RKG), put(state.out, out_RKGH))


def _sum_rows(mine_RE: jax.Array, items: jax.Array) -> jax.Array:
    flat = items.reshape(items.shape[0], math.prod(items.shape[1:]))
    rows = jnp.einsum("re,ef->rf", mine_RE, flat, precision=lax.Precision.HIGHEST)
    return rows.reshape(-1, *items.shape[1:])
