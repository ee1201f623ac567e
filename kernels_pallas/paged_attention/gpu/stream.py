"""Asynchronous copies of key and value pages into shared memory, ahead of the compute warpgroups."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.paged_attention.api import AttentionConfig
from kernels_pallas.paged_attention.gpu.tile import Tile
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.warpgroup import smem


class KeyBlocks(NamedTuple):
    """A range of a row's keys, in blocks of `Tile.keys`.

    Attributes:
        row: row of the page table.
        first, end: range of blocks.
        first_page, last_page: first and last of the row's pages that hold visible keys.
    """

    row: jax.Array
    first: jax.Array
    end: jax.Array
    first_page: jax.Array
    last_page: jax.Array


class LiveKeys(NamedTuple):
    """The range of a block's keys that exist and are loaded: `[first, end)`, counted from the block's first key.

    Slots past a row's end may hold anything, and so may the slots of pages outside the visible range, for which
    `page_numbers` substitutes another page of the row.
    """

    first: jax.Array
    end: jax.Array


class Stages(NamedTuple):
    """Shared memory of the pipeline stages, [stages, keys, H], and the barriers that signal the arrival of copies.

    `values` and `values_ready` are None where values are part of the keys.
    """

    keys: Any
    values: Any
    keys_ready: Any
    values_ready: Any


class Source(NamedTuple):
    """The location of a head's keys and values in global memory.

    Attributes:
        head: key head.
        layer_page: first page of the layer.
        page_table_BM: i32, pages within the layer.
        keys_PKSH, values_PKSH: pages of all layers; `values_PKSH` is None where values are part of the keys.
    """

    head: jax.Array
    layer_page: jax.Array
    page_table_BM: Any
    keys_PKSH: Any
    values_PKSH: Any


def stage_types(tile: Tile, config: AttentionConfig) -> Stages:
    """Return the scratch types of `Stages`."""
    buffer = smem((tile.stages, tile.keys, config.head_dim), config.dtype)
    ready = plgpu.Barrier(num_arrivals=max(1, tile.keys // config.page_size), num_barriers=tile.stages)
    return Stages(buffer, buffer, ready, ready) if config.value_dim is None else Stages(buffer, None, ready, None)


def blocks_between(row: jax.Array, first_key: jax.Array, end_key: jax.Array, tile: Tile, page_size: int) -> KeyBlocks:
    """Return the blocks that hold keys `[first_key, end_key)` of a row."""
    return KeyBlocks(
        row,
        lax.div(first_key, tile.keys),
        pl.cdiv(end_key, tile.keys),
        lax.div(first_key, page_size),
        lax.div(jnp.maximum(end_key, 1) - 1, page_size),
    )


def live_keys(blocks: KeyBlocks, index: jax.Array, kv_len: jax.Array, tile: Tile, page_size: int) -> LiveKeys:
    """Return the live keys of a block, in a row of `kv_len` keys."""
    first_key = index * tile.keys
    return LiveKeys(blocks.first_page * page_size - first_key, kv_len - first_key)


def page_numbers(blocks: KeyBlocks, tile: Tile, page_size: int, index: jax.Array) -> list[jax.Array]:
    """Return the page that contains a block, or the pages that the block consists of, as indices into the row.

    The visible range may start or end within the block. Pages outside of it are replaced by the nearest page inside,
    which is needed anyway, to save bandwidth.
    """
    count = max(1, tile.keys // page_size)
    first = index if page_size <= tile.keys else lax.div(index, page_size // tile.keys)
    return [jnp.clip(first * count + part, blocks.first_page, blocks.last_page) for part in range(count)]


def find_pages(source: Source, blocks: KeyBlocks, tile: Tile, index: jax.Array) -> list[jax.Array]:
    """Return the pages of a block, as indices into the pages of all layers."""
    numbers = page_numbers(blocks, tile, source.keys_PKSH.shape[2], index)
    return [source.layer_page + source.page_table_BM[blocks.row, number] for number in numbers]


def copy_block(
    pages_PKSH: Any,
    head: jax.Array,
    pages: list[jax.Array],
    index: jax.Array,
    tile: Tile,
    buffer: Any,
    ready: Any,
    slot: jax.Array,
) -> None:
    """Start copying one block of keys or values into stage `slot`."""
    page_size = pages_PKSH.shape[2]
    if page_size > tile.keys:
        part = pl.ds(lax.rem(index, page_size // tile.keys) * tile.keys, tile.keys)
        plgpu.copy_gmem_to_smem(pages_PKSH.at[pages[0], head, part], buffer.at[slot], ready.at[slot])
        return
    for part, page in enumerate(pages):
        target = buffer.at[slot, pl.ds(part * page_size, page_size)]
        plgpu.copy_gmem_to_smem(pages_PKSH.at[page, head], target, ready.at[slot])
