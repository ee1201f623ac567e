"""Attention of rows that run one token: a flat list of (row, range of keys) items, a fixed number at a time."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.paged_attention.api import AttentionConfig, AttentionMeta
from kernels_pallas.paged_attention.common.partial_softmax import MASKED, PartialSoftmax, attend_part, from_sinks
from kernels_pallas.paged_attention.xla.pages import LayerInputs, expand, group_pages, take_keys_and_values

# Keys per item: enough to amortise the call of a product, few enough that little is padding.
_ITEM_TOKENS = 256
# Items at a time: the pages that they gather should stay in the cache of one or two cores.
_MAX_ITEMS = 32


class DecodeItems(NamedTuple):
    """Work of one step: I items of W pages each.

    Attributes:
        num_live: i32, number of live items.
        row_I: i32, row of each item, ascending.
        pages_IW: i32, page ids within a layer; arbitrary past the row's end.
        start_I: i32, position of each item's first key.
        kv_len_B: i32, number of keys of each row.
    """

    num_live: jax.Array
    row_I: jax.Array
    pages_IW: jax.Array
    start_I: jax.Array
    kv_len_B: jax.Array


def plan_decode(config: AttentionConfig, meta: AttentionMeta) -> DecodeItems:
    """List the items of the rows that run one token."""
    pages_per_item = max(1, _ITEM_TOKENS // config.page_size)
    item_tokens = pages_per_item * config.page_size
    table_BGW = group_pages(meta.page_table_BM, pages_per_item)
    num_rows = meta.kv_lens_B.shape[0]
    first_B = jnp.zeros_like(meta.kv_lens_B)
    if config.window is not None:
        first_B = jnp.maximum(meta.kv_lens_B - config.window, 0) // item_tokens
    items_B = -(-meta.kv_lens_B // item_tokens) - first_B
    items_B = jnp.where(jnp.arange(num_rows) < meta.distribution_2[0], items_B, 0)
    row_I, index_I, count = expand(items_B, num_rows * table_BGW.shape[1])
    index_I += first_B[row_I]
    return DecodeItems(count, row_I, table_BGW[row_I, index_I], index_I * item_tokens, meta.kv_lens_B)


def attend_decode(config: AttentionConfig, layer: LayerInputs, items: DecodeItems) -> jax.Array:
    """Attend the rows that run one token; token b belongs to row b.

    Returns:
        f32 [T, K, G, H]; 0 for tokens of other rows.
    """
    num_rows, num_items = items.kv_len_B.shape[0], items.row_I.shape[0]
    chunk = min(num_rows, _MAX_ITEMS, num_items)
    key_s = jnp.arange(items.pages_IW.shape[1] * config.page_size)
    q_BKGH = layer.q_TKGH[:num_rows]

    def body(index: jax.Array, state: PartialSoftmax) -> PartialSoftmax:
        # The last chunk is shifted back to stay within the list; the items that it repeats are masked out.
        start = jnp.minimum(index * chunk, num_items - chunk)
        take = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=chunk)
        row_E, pages_EW = take(items.row_I), layer.first_page + take(items.pages_IW)
        item_E = start + jnp.arange(chunk)
        position_Es = take(items.start_I)[:, None] + key_s
        kv_len_E1 = items.kv_len_B[row_E][:, None]
        live_Es = ((item_E >= index * chunk) & (item_E < items.num_live))[:, None] & (position_Es < kv_len_E1)
        if config.window is not None:
            live_Es &= position_Es >= kv_len_E1 - config.window
        keys_EKSH, values_EKSH = take_keys_and_values(layer, config, pages_EW)
        scores_EKGs = config.scores("ekgh,eksh->ekgs", q_BKGH[row_E], keys_EKSH)
        part = attend_part(
            scores_EKGs,
            live_Es[:, None, None, :],
            values_EKSH,
            "ekgs,eksh->ekgh",
            live_Es[:, None, :, None],
        )
        return _merge_rows(state, part, row_E)

    # Padding after the rows, for a chunk that starts at the last row.
    state = from_sinks(layer.sinks_KG, (num_rows + chunk, *q_BKGH.shape[1:3], config.out_dim))
    state = lax.fori_loop(0, -(-items.num_live // chunk), body, state)
    o_BKGH = state.values()[:num_rows]
    return jnp.pad(o_BKGH, ((0, layer.q_TKGH.shape[0] - num_rows), (0, 0), (0, 0), (0, 0)))


def _merge_rows(state: PartialSoftmax, part: PartialSoftmax, row_E: jax.Array) -> PartialSoftmax:
    """Merge items into their rows. Rows ascend, so E items touch at most E consecutive rows."""
    num_items = row_E.shape[0]
    first = row_E[0]
    take = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=num_items)
    put = partial(lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
    local_E = row_E - first
    mine_RE = local_E[None, :] == jnp.arange(num_items)[:, None]
    max_REKG = jnp.where(mine_RE[:, :, None, None], part.row_max[None], MASKED)
    old_max_RKG = take(state.row_max)
    max_RKG = jnp.maximum(old_max_RKG, jnp.max(max_REKG, axis=1))
    old_RKG = jnp.exp(old_max_RKG - max_RKG)
    weight_EKG = jnp.exp(part.row_max - max_RKG[local_E])
    sum_rows = partial(_sum_rows, mine_RE.astype(jnp.float32))
    sum_RKG = take(state.row_sum) * old_RKG + sum_rows(part.row_sum * weight_EKG)
    out_RKGH = take(state.out) * old_RKG[..., None] + sum_rows(part.out * weight_EKG[..., None])
    return PartialSoftmax(put(state.row_max, max_RKG), put(state.row_sum, sum_RKG), put(state.out, out_RKGH))


def _sum_rows(mine_RE: jax.Array, items: jax.Array) -> jax.Array:
    flat = items.reshape(items.shape[0], math.prod(items.shape[1:]))
    rows = jnp.einsum("re,ef->rf", mine_RE, flat, precision=lax.Precision.HIGHEST)
    return rows.reshape(-1, *items.shape[1:])
