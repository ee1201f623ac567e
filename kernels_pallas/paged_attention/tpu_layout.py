"""How a token's key and value lie in the lanes of a TPU's cache.

    head of 64:   | key 0..63 | value 64..127 |                      one tile of 128 lanes
    head of 128:  | key 0..127 | value 128..255 |                    two tiles
    head of 80:   | key 0..79, zeros | value 128..207, zeros |       two tiles

`[L * P pages, K heads, S tokens, Z lanes]`: a page is contiguous, and a head's page is a matrix.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128


@dataclasses.dataclass(frozen=True)
class TpuLayout:
    """Lanes of one cached token.

    Attributes:
        head_dim: H.
        dtype: of the cache.
        page_size: S.
    """

    head_dim: int
    dtype: Any
    page_size: int

    @property
    def shared(self) -> bool:
        """Key and value share one tile of lanes."""
        return 2 * self.head_dim <= LANES

    @property
    def half(self) -> int:
        """Lanes of a key; the value's start there."""
        return self.head_dim if self.shared else -(-self.head_dim // LANES) * LANES

    @property
    def lanes(self) -> int:
        """Z."""
        return LANES if self.shared else 2 * self.half

    @property
    def head_lanes(self) -> int:
        """Lanes of queries and of results."""
        return LANES if self.shared else self.half

    @property
    def sublanes(self) -> int:
        """Tokens of a tile: what a write replaces at least."""
        return min(32 // jnp.dtype(self.dtype).itemsize, self.page_size)

    def pack(self, k: jax.Array, v: jax.Array) -> jax.Array:
        """[..., H] keys and values -> [..., Z]."""
        if self.shared:
            return self._pad(jnp.concatenate([k, v], axis=-1), self.lanes)
        return jnp.concatenate([self._pad(k, self.half), self._pad(v, self.half)], axis=-1)

    def unpack(self, kv: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The inverse of `pack`."""
        return kv[..., : self.head_dim], kv[..., self.half : self.half + self.head_dim]

    def pad_queries(self, q: jax.Array) -> jax.Array:
        """[..., H] -> [..., head_lanes]; zeros against the values' lanes leave them out of the scores."""
        return self._pad(q, self.head_lanes)

    def keys(self, kv: jax.Array) -> jax.Array:
        """The lanes that queries meet."""
        return kv if self.shared else kv[..., : self.half]

    def values(self, kv: jax.Array) -> jax.Array:
        """The lanes that weights meet."""
        return kv if self.shared else kv[..., self.half :]

    def results(self, o: jax.Array) -> jax.Array:
        """[..., head_lanes] -> [..., H]."""
        start = self.half if self.shared else 0
        return o[..., start : start + self.head_dim]

    @staticmethod
    def _pad(x: jax.Array, size: int) -> jax.Array:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, size - x.shape[-1]),))
