"""Copying pages from one backend's cache to another's, through a function that transforms them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.paged_attention.api import AttentionBackend, Cache
from kernels_pallas.paged_attention.common.split_meta import RemappedPages
from kernels_pallas.shards import MODEL, model_size, over_model

# Tokens moved per loop iteration.
_TOKENS_AT_ONCE = 1024


def move_pages(
    change: Callable[..., tuple[jax.Array, jax.Array]],
    operands: Any,
    source: tuple[AttentionBackend, Cache],
    target: AttentionBackend,
    remapped: RemappedPages,
    mesh: Mesh,
) -> Cache:
    """Return a one-layer cache of `target` with the live pages of `source`; other pages are undefined.

    Args:
        change: `(operands, *unpacked) -> keys and values`, [pages, heads, S, H], on one shard of the heads.
        operands: pytree of arrays whose first axis is heads, or None.
        source: a backend and its cache.
        target: the backend of the new cache.
        remapped: the pages to copy, as indices into the source's pages of all layers.
        mesh: mesh of the devices.
    """
    backend, cache = source
    specs = {name: spec.partition for name, spec in backend.cache_spec().items()}
    by_head = jax.tree.map(lambda _: P(MODEL), operands)
    results = {name: spec.partition for name, spec in target.cache_spec().items()}
    move = partial(_move_shard, change, backend, target, model_size(mesh))
    return over_model(move, mesh, (by_head, specs, P()), results)(operands, cache, remapped)


def _move_shard(
    change: Callable[..., tuple[jax.Array, jax.Array]],
    source: AttentionBackend,
    target: AttentionBackend,
    num_shards: int,
    operands: Any,
    cache: Cache,
    remapped: RemappedPages,
) -> Cache:
    num_pages = target.config.num_pages
    at_once = min(max(1, _TOKENS_AT_ONCE // target.config.page_size), num_pages)
    made = {
        name: lax.empty((num_pages, spec.shape[1] // num_shards, *spec.shape[2:]), spec.dtype)
        for name, spec in target.cache_spec().items()
    }

    def body(turn: jax.Array, made: Cache) -> Cache:
        # The last iteration is shifted back to stay in bounds, and computes some pages again.
        first = jnp.minimum(turn * at_once, num_pages - at_once)
        page_P = lax.dynamic_slice_in_dim(remapped.page_P, first, at_once)
        taken = {name: pages.at[page_P].get(mode="promise_in_bounds") for name, pages in cache.items()}
        packed = target.pack(*change(operands, *source.unpack(taken)))
        # The layout that kernels expect. On TPU, XLA would keep the layout of the matmul's result and transpose the
        # whole cache afterwards.
        rows = {name: with_layout_constraint(new, Layout(tuple(range(new.ndim)))) for name, new in packed.items()}
        return {name: lax.dynamic_update_slice_in_dim(pages, rows[name], first, axis=0) for name, pages in made.items()}

    return lax.fori_loop(0, -(-remapped.num_live // at_once), body, made)
