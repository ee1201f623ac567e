"""The work of a decode step: the rows' key blocks, cut into items of about equal size.

A thread block attends one item for one key head. A few long rows are cut finely, so that they fill the device; many
short ones are not cut at all. Items of a row are consecutive.

Dimension key: B rows, W items.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.paged_attention.api import AttentionConfig
from kernels_pallas.paged_attention.gpu.tile import Tile
from kernels_pallas.paged_attention.xla.pages import expand

# Thread blocks per SM that run at the same time, and how many of them one after the other: the last ones to start are
# short against all.
_BLOCKS_PER_CORE = 2
_WAVES = 2


class DecodeWork(NamedTuple):
    """The items of a step; entries past the number of items are arbitrary.

    Attributes:
        row_W: i32, the row of each item.
        first_W, end_W: i32, its range of key blocks.
        end_B: i32, the end of each row's items.
    """

    row_W: jax.Array
    first_W: jax.Array
    end_W: jax.Array
    end_B: jax.Array


def max_items(num_rows: int, num_kv_heads: int, num_cores: int) -> int:
    """Return the number of items that the rows of a step can have."""
    return num_rows + _wanted_items(num_kv_heads, num_cores)


def plan_decode(
    config: AttentionConfig,
    tile: Tile,
    kv_len_B: jax.Array,
    num_single: jax.Array | int,
    *,
    num_kv_heads: int,
    num_cores: int,
) -> DecodeWork:
    """Cut the rows that run one token into items.

    Args:
        config: config of the layers.
        tile: tile of a thread block.
        kv_len_B: i32, number of keys of each row.
        num_single: number of rows that run one token; they come first.
        num_kv_heads: key heads on one device.
        num_cores: SMs of the device.
    """
    num_rows = kv_len_B.shape[0]
    first_key_B = jnp.zeros_like(kv_len_B) if config.window is None else jnp.maximum(kv_len_B - config.window, 0)
    first_B, end_B = first_key_B // tile.keys, -(-kv_len_B // tile.keys)
    blocks_B = jnp.where(jnp.arange(num_rows) < num_single, end_B - first_B, 0)
    wanted = _wanted_items(num_kv_heads, num_cores)
    share = jnp.maximum(-(-jnp.sum(blocks_B) // wanted), 1)
    count_B = -(-blocks_B // share)
    row_W, index_W, _ = expand(count_B, max_items(num_rows, num_kv_heads, num_cores))
    first_W = first_B[row_W] + index_W * share
    return DecodeWork(row_W, first_W, jnp.minimum(first_W + share, end_B[row_W]), jnp.cumsum(count_B, dtype=jnp.int32))


def _wanted_items(num_kv_heads: int, num_cores: int) -> int:
    return math.ceil(_WAVES * _BLOCKS_PER_CORE * num_cores / num_kv_heads)
