"""Attention of rows that run several tokens: tiles of queries, each over its row's keys up to the causal limit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.paged_attention.api import AttentionConfig, AttentionMeta
from kernels_pallas.paged_attention.common.partial_softmax import PartialSoftmax, attend_part, from_sinks, merge
from kernels_pallas.paged_attention.xla.pages import LayerInputs, expand, group_pages, take_keys_and_values

# Keys at a time. Large tiles are at the start of a prompt, where more keys would mostly be masked; small tiles are at
# its end, often after a long cached prefix, where fewer keys would not amortise a pass.
_LARGE_TILE = 128
_LARGE_TILE_KEYS, _SMALL_TILE_KEYS = 128, 256


class QueryTiles(NamedTuple):
    """Q query tiles of one size.

    Attributes:
        num_live: i32, number of live tiles.
        row_Q: i32, row of each tile, ascending.
        token_Q: i32, first token of each tile.
    """

    num_live: jax.Array
    row_Q: jax.Array
    token_Q: jax.Array


def plan_tiles(meta: AttentionMeta, first_row: jax.Array, sizes: tuple[int, ...]) -> tuple[QueryTiles, ...]:
    """Cut the rows from `first_row` on into tiles of the largest size, and the rest of each row into smaller ones.

    Args:
        meta: metadata of the step.
        first_row: rows before it have no tiles.
        sizes: tokens per tile, descending; each a multiple of the next.
    """
    num_rows, num_tokens = meta.kv_lens_B.shape[0], meta.positions_T.shape[0]
    row_B = jnp.arange(num_rows)
    left_B = jnp.where((row_B >= first_row) & (row_B < meta.distribution_2[1]), jnp.diff(meta.cu_q_lens_B1), 0)
    token_B = meta.cu_q_lens_B1[:-1]
    plans: list[QueryTiles] = []
    for size in sizes:
        last = size == sizes[-1]
        tiles_B = -(-left_B // size) if last else left_B // size
        row_Q, index_Q, count = expand(tiles_B, num_tokens // size + (min(num_rows, num_tokens) if last else 0))
        plans.append(QueryTiles(count, row_Q, token_B[row_Q] + index_Q * size))
        left_B -= tiles_B * size
        token_B += tiles_B * size
    return tuple(plans)


def attend_tiles(
    config: AttentionConfig,
    layer: LayerInputs,
    meta: AttentionMeta,
    tiles: QueryTiles,
    size: int,
    o_TKGH: jax.Array,
) -> jax.Array:
    """Attend the tiles of one size.

    Returns:
        `o_TKGH` with the outputs of the tiles; a row's last tile may overwrite up to `size - 1` tokens after the row.
    """
    num_tokens, num_heads, group, _ = layer.q_TKGH.shape
    padding = ((0, size), (0, 0), (0, 0), (0, 0))
    q_TKGH = jnp.pad(layer.q_TKGH, padding)
    pages_per_chunk = max(1, (_LARGE_TILE_KEYS if size >= _LARGE_TILE else _SMALL_TILE_KEYS) // config.page_size)
    chunk = pages_per_chunk * config.page_size
    table_BCW = group_pages(meta.page_table_BM, pages_per_chunk)

    def attend_tile(index: jax.Array, o_TKGH: jax.Array) -> jax.Array:
        row, token = tiles.row_Q[index], tiles.token_Q[index]
        end = meta.cu_q_lens_B1[row + 1]
        position_t = meta.kv_lens_B[row] - end + token + jnp.arange(size)
        q_tKGH = lax.dynamic_slice_in_dim(q_TKGH, token, size)
        # Keys that the last live token of the tile can see.
        kv_len = meta.kv_lens_B[row] - end + jnp.minimum(token + size, end)

        def body(index: jax.Array, state: PartialSoftmax) -> PartialSoftmax:
            pages_1W = layer.first_page + table_BCW[row, index][None]
            position_s = index * chunk + jnp.arange(chunk)
            live_ts = (position_s <= position_t[:, None]) & (position_s < kv_len)
            if config.window is not None:
                live_ts &= position_s > position_t[:, None] - config.window
            keys_1KSH, values_1KSH = take_keys_and_values(layer, config, pages_1W)
            scores_KtGs = config.scores("tkgh,ksh->ktgs", q_tKGH, keys_1KSH[0])
            part = attend_part(
                scores_KtGs,
                live_ts[None, :, None, :],
                values_1KSH[0],
                "ktgs,ksh->ktgh",
                (position_s < kv_len)[:, None],
            )
            return merge(state, part)

        first = 0
        if config.window is not None:
            first = jnp.maximum(position_t[0] + 1 - config.window, 0) // chunk
        state = from_sinks(layer.sinks_KG[:, None], (num_heads, size, group, config.out_dim))
        state = lax.fori_loop(first, -(-kv_len // chunk), body, state)
        return lax.dynamic_update_slice_in_dim(o_TKGH, jnp.moveaxis(state.values(), 0, 1), token, 0)

    return lax.fori_loop(0, tiles.num_live, attend_tile, jnp.pad(o_TKGH, padding))[:num_tokens]
