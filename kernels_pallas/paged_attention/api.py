"""The interface that every attention backend implements.

A backend owns its cache: an opaque pytree of arrays that have pages as the leading axis and contain all layers, so
that a layer is an offset and the layers can be scanned. Callers build `AttentionMeta` once per step, let the
backend `plan` it once, and call `attend` once per layer.

Dimension key: T packed tokens, B rows, M pages per row, N query heads, K key/value heads, H head dim,
S page size, L layers, P pages of one layer.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Cache: TypeAlias = dict[str, jax.Array]
Plan: TypeAlias = Any


class AttentionMeta(NamedTuple):
    """Metadata of a step: the rows, pages and slots of its tokens. Rows that run a single token come first.

    Shapes carry meaning, too: with T = B, every row runs a single token.

    Attributes:
        kv_lens_B: i32, number of keys of each row once this step's are written; 0 for padding rows.
        page_table_BM: i32, the pages of each row in order; entries past the row's length are 0.
        cu_q_lens_B1: i32[B + 1], cumulative query lengths: the first token of each row, then the number of live
            tokens, which padding rows repeat.
        distribution_2: i32[2], (number of rows that run one token, number of live rows).
        slot_mapping_T: i32, `page_id * page_size + offset` of each token; padding tokens point past the pool.
        positions_T: i32, position of each token in its sequence.
    """

    kv_lens_B: jax.Array
    page_table_BM: jax.Array
    cu_q_lens_B1: jax.Array
    distribution_2: jax.Array
    slot_mapping_T: jax.Array
    positions_T: jax.Array


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attention parameters that are fixed for the life of a model.

    Attributes:
        num_layers, num_q_heads, num_kv_heads, head_dim: sizes of the whole model, not of a shard.
        page_size: tokens per page.
        num_pages: pages of one layer.
        dtype: dtype of the cached keys and values.
        scale: softmax scale, multiplied with the scores.
        window: sliding window: number of keys that a query sees, its own included; None for all keys up to its own.
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`; None for no cap.
        value_dim: if set, a value is the first `value_dim` channels of its key and is not cached separately; if None,
            values are separate and have `head_dim` channels.
        batch_invariant: compute every row in shapes that do not depend on the other rows.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int
    dtype: Any
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    value_dim: int | None = None
    batch_invariant: bool = False

    @property
    def compute_dtype(self) -> Any:
        """Dtype of queries, and of keys and values once loaded: the cache's dtype, or bf16 for an 8-bit cache."""
        return self.dtype if jnp.dtype(self.dtype).itemsize > 1 else jnp.bfloat16

    @property
    def out_dim(self) -> int:
        """Channels of a head's output."""
        return self.head_dim if self.value_dim is None else self.value_dim

    def split(self, parts: int) -> "AttentionConfig":
        """Return the config for the heads of one of `parts` shards."""
        return dataclasses.replace(self, num_q_heads=self.num_q_heads // parts, num_kv_heads=self.num_kv_heads // parts)

    def to_cache(self, x_TKH: jax.Array) -> jax.Array:
        """Cast keys or values to the cache's dtype; elements out of the range of an 8-bit dtype are clipped."""
        if jnp.dtype(self.dtype).itemsize > 1:
            return x_TKH.astype(self.dtype)
        x_TKH = x_TKH.astype(jnp.float32)
        if jnp.issubdtype(self.dtype, jnp.integer):
            info: Any = jnp.iinfo(self.dtype)
            x_TKH = jnp.round(x_TKH)
        else:
            info = jnp.finfo(self.dtype)
        return jnp.clip(x_TKH, float(info.min), float(info.max)).astype(self.dtype)

    def scores(self, equation: str, q: jax.Array, k: jax.Array) -> jax.Array:
        """Return scaled and capped scores in f32; `equation` is the einsum of queries and keys."""
        scores = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32) * self.scale
        return scores if self.soft_cap is None else self.soft_cap * jnp.tanh(scores / self.soft_cap)


class CacheSpec(NamedTuple):
    """Shape, dtype and partitioning of one cache array."""

    shape: tuple[int, ...]
    dtype: Any
    partition: PartitionSpec


class AttentionBackend(Protocol):
    """Paged attention of one platform."""

    config: AttentionConfig
    max_table_entries: int | None
    """Rows times pages per row that a page table may have; None for any."""

    def cache_spec(self) -> dict[str, CacheSpec]:
        """Return the specs of the cache's arrays, each with pages as its leading axis."""
        ...

    def unpack(self, arrays: Cache) -> tuple[jax.Array, ...]:
        """Return keys and, if they are cached separately, values from cache arrays, [..., H] each.

        Args:
            arrays: arrays with the dtypes and the last axis of the cache's arrays.
        """
        ...

    def pack(self, k: jax.Array, v: jax.Array) -> Cache:
        """Convert keys and values of any float dtype to cache arrays, the inverse of `unpack`."""
        ...

    def writer(self) -> "AttentionBackend":
        """Return a backend that only writes to the same cache: one query per key head, outputs without meaning."""
        ...

    def decode_bytes(self, kv_lens: list[int], num_rows: int) -> int:
        """Return the bytes that the decode kernel moves between memory and one device for one layer.

        Args:
            kv_lens: number of keys of each row that runs one token.
            num_rows: rows that the step is compiled for.
        """
        ...

    def plan(self, meta: AttentionMeta) -> Plan:
        """Derive what `attend` needs from `meta`, once per step for all layers with the same window."""
        ...

    def attend(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Cache,
        layer: jax.Array,
        plan: Plan,
        sinks_N: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Write this step's keys and values, then attend. Donates nothing by itself; returns the new cache.

        The output of token t of row b is `softmax(scale * q_t K_b^T + mask) V_b` over the row's keys up to the
        position of t, with scores and sums in float32.

        Args:
            q_TNH: rotated queries; padding tokens may hold anything.
            k_TKH: rotated keys.
            v_TKH: values; ignored where they are part of the keys.
            cache: the arrays of `cache_spec`.
            layer: i32 scalar, index of the layer; may be traced.
            plan: the result of `plan`.
            sinks_N: f32 attention sinks, an extra score per query head that takes probability mass but has no value; or
                None.

        Returns:
            o_TNH in q's dtype (arbitrary but finite for padding tokens) and the cache.
        """
        ...


def pad_last_axis(x: jax.Array, size: int) -> jax.Array:
    """Pad the last axis with zeros to `size` elements."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, size - x.shape[-1]),))


def writing(config: AttentionConfig) -> AttentionConfig:
    """Return the config of `AttentionBackend.writer`: queries see only their own key, without a decode path."""
    return dataclasses.replace(config, num_q_heads=config.num_kv_heads, window=1, batch_invariant=True)


def with_window(backend: AttentionBackend, window: int | None) -> AttentionBackend:
    """Return the backend, over the same cache, for layers with another window."""
    other = copy.copy(backend)
    other.config = dataclasses.replace(backend.config, window=window)
    return other
