"""Heads split over the devices of a replica, and the head-major layout of pages."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.paged_attention.api import AttentionBackend, AttentionConfig, CacheSpec
from kernels_pallas.shards import MODEL, model_size, over_model

# The axes of pages in every layout: pages, key heads, tokens, channels.
PAGES_PARTITION = P(None, MODEL, None, None)


def head_major_spec(config: AttentionConfig) -> dict[str, CacheSpec]:
    """Return the specs of separate keys and values, [L * P, K, S, H]; only keys if they contain the values."""
    c = config
    shape = (c.num_layers * c.num_pages, c.num_kv_heads, c.page_size, c.head_dim)
    spec = CacheSpec(shape, c.dtype, PAGES_PARTITION)
    return {"k": spec, "v": spec} if c.value_dim is None else {"k": spec}


def cache_bytes(backend: AttentionBackend, mesh: Mesh) -> int:
    """Return the bytes of a replica's cache on each of its devices."""
    return sum(
        math.prod(spec.shape) * jnp.dtype(spec.dtype).itemsize // (model_size(mesh) if MODEL in spec.partition else 1)
        for spec in backend.cache_spec().values()
    )


def over_heads(attend: Callable[..., Any], mesh: Mesh, cache: Iterable[str]) -> Callable[..., Any]:
    """Wrap an `attend` function to run on each shard of the heads; `cache` contains the names of the cache's arrays."""
    heads, pages = P(None, MODEL, None), dict.fromkeys(cache, PAGES_PARTITION)
    in_specs = (heads, heads, heads, pages, P(), P(), P(MODEL))
    return over_model(attend, mesh, in_specs, (heads, pages))
