"""Layout of a token's key and value in the lanes of the TPU cache.

    head dim 64:                  | key 0..63 | value 64..127 |                one tile of 128 lanes
    head dim 128:                 | key 0..127 | value 128..255 |              two tiles
    head dim 80:                  | key 0..79, zeros | value 128..207, zeros |  two tiles
    head dim 576, value_dim 512:  | key 0..575, zeros |                        five tiles

Pages are `[L * P pages, K heads, S tokens, Z lanes]`: a page is contiguous, and a head's page is a matrix.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.paged_attention.api import AttentionConfig, pad_last_axis

LANES = 128


@dataclasses.dataclass(frozen=True)
class TpuLayout:
    """Layout of one cached token in lanes.

    Attributes:
        head_dim: H.
        dtype: dtype of the cache.
        page_size: S.
        value_dim: see `AttentionConfig`.
    """

    head_dim: int
    dtype: Any
    page_size: int
    value_dim: int | None = None

    @classmethod
    def of(cls, config: AttentionConfig) -> "TpuLayout":
        """Return the layout of a model's cache."""
        return cls(config.head_dim, config.dtype, config.page_size, config.value_dim)

    @property
    def shared(self) -> bool:
        """Whether key and value share one tile of lanes."""
        return self.value_dim is None and 2 * self.head_dim <= LANES

    @property
    def value_start(self) -> int:
        """First lane of a value."""
        if self.value_dim is not None:
            return 0
        return self.head_dim if self.shared else _whole_tiles(self.head_dim)

    @property
    def lanes(self) -> int:
        """Lanes of a cached token, Z."""
        return LANES if self.shared else self.value_start + _whole_tiles(self.head_dim)

    @property
    def query_lanes(self) -> int:
        """Lanes of a query."""
        return LANES if self.shared else _whole_tiles(self.head_dim)

    @property
    def result_lanes(self) -> int:
        """Lanes of an output."""
        return self.query_lanes if self.value_dim is None else _whole_tiles(self.value_dim)

    @property
    def sublanes(self) -> int:
        """Tokens per tile, the minimum that a write replaces."""
        return min(32 // jnp.dtype(self.dtype).itemsize, self.page_size)

    def pack(self, k: jax.Array, v: jax.Array) -> jax.Array:
        """[..., H] keys and values -> [..., Z]."""
        if self.value_dim is None:
            k = jnp.concatenate([pad_last_axis(k, self.value_start), v], axis=-1)
        return pad_last_axis(k, self.lanes)

    def unpack(self, kv: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The inverse of `pack`."""
        return kv[..., : self.head_dim], self.results(self.values(kv))

    def pad_queries(self, q: jax.Array) -> jax.Array:
        """[..., H] -> [..., query_lanes]; zeros in the lanes of values keep those out of the scores."""
        return pad_last_axis(q, self.query_lanes)

    def keys(self, kv: jax.Array) -> jax.Array:
        """Return the lanes that are multiplied with queries."""
        return kv[..., : self.query_lanes]

    def values(self, kv: jax.Array) -> jax.Array:
        """Return the lanes that are multiplied with softmax weights."""
        return kv if self.shared else kv[..., self.value_start : self.value_start + self.result_lanes]

    def results(self, o: jax.Array) -> jax.Array:
        """[..., result_lanes] -> [..., H], or [..., value_dim] if that is set."""
        start = self.value_start if self.shared else 0
        return o[..., start : start + (self.head_dim if self.value_dim is None else self.value_dim)]


def _whole_tiles(numbers: int) -> int:
    return -(-numbers // LANES) * LANES
