"""Reading and writing pages in portable XLA. Pages are head-major, [pages of all layers, K, S, H]."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.paged_attention.api import AttentionConfig


class LayerInputs(NamedTuple):
    """Attention inputs of one layer on one shard.

    Attributes:
        q_TKGH: queries by key head, in the compute dtype.
        keys_PKSH, values_PKSH: pages of all layers, with this step's tokens written; `values_PKSH` is None where values
            are the first channels of the keys.
        first_page: i32, first page of the layer.
        sinks_KG: f32 scores of the sinks.
    """

    q_TKGH: jax.Array
    keys_PKSH: jax.Array
    values_PKSH: jax.Array | None
    first_page: jax.Array
    sinks_KG: jax.Array


def take_keys_and_values(
    layer: LayerInputs, config: AttentionConfig, page_EW: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gather keys and values in the compute dtype; see `take_pages`."""

    def take(pages_PKSH: jax.Array) -> jax.Array:
        return from_stored(take_pages(pages_PKSH, page_EW), config).astype(layer.q_TKGH.dtype)

    keys_EKSH = take(layer.keys_PKSH)
    if layer.values_PKSH is None:
        return keys_EKSH, keys_EKSH[..., : config.out_dim]
    return keys_EKSH, take(layer.values_PKSH)


def stored_dtype(config: AttentionConfig) -> Any:
    """Return the dtype of the cache arrays: uint8 for 8-bit floats.

    To write one token into an array of 8-bit floats, XLA on CPU would convert the whole array.
    """
    is_small_float = jnp.issubdtype(config.dtype, jnp.floating) and jnp.dtype(config.dtype).itemsize == 1
    return jnp.uint8 if is_small_float else config.dtype


def to_stored(x: jax.Array, config: AttentionConfig) -> jax.Array:
    """Convert keys or values to the stored dtype."""
    return lax.bitcast_convert_type(config.to_cache(x), stored_dtype(config))


def from_stored(x: jax.Array, config: AttentionConfig) -> jax.Array:
    """Reinterpret stored keys or values in the cache's dtype."""
    return lax.bitcast_convert_type(x, config.dtype)


def take_pages(pages_PKSH: jax.Array, page_EW: jax.Array) -> jax.Array:
    """Gather keys or values of E lists of W pages, head-major: [E, K, W * S, H]. Every page must exist.

    Pages are gathered as flat rows, one per page and head: XLA on CPU copies those three times faster than pages of
    four axes, and they are in the order that the products need. The barrier keeps XLA from undoing the reshape.
    """
    _, num_heads, page_size, head_dim = pages_PKSH.shape
    row_EKW = page_EW[:, None, :] * num_heads + jnp.arange(num_heads)[:, None]
    rows_RF = pages_PKSH.reshape(-1, page_size * head_dim)
    flat_RF = lax.optimization_barrier(rows_RF.at[row_EKW.reshape(-1)].get(mode="promise_in_bounds"))
    return flat_RF.reshape(page_EW.shape[0], num_heads, -1, head_dim)


def expand(counts_B: jax.Array, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """List (row, index within the row) for `counts_B` entries per row, padded to `length`, and return their number."""
    ends_B = jnp.cumsum(counts_B, dtype=jnp.int32)
    item_I = jnp.arange(length, dtype=jnp.int32)
    row_I = jnp.minimum(
        jnp.searchsorted(ends_B, item_I, side="right", method="compare_all").astype(jnp.int32), counts_B.shape[0] - 1
    )
    index_I = jnp.where(item_I < ends_B[-1], item_I - (ends_B - counts_B)[row_I], 0)
    return row_I, index_I, ends_B[-1]


def group_pages(page_table_BM: jax.Array, count: int) -> jax.Array:
    """Return the page table in groups of `count` pages, [B, groups, count]; the last group is padded with page 0."""
    padded_BM = jnp.pad(page_table_BM, ((0, 0), (0, -page_table_BM.shape[1] % count)))
    return padded_BM.reshape(page_table_BM.shape[0], -1, count)
