"""Rotary position embedding of queries and keys (arXiv:2104.09864), after the norms that some models have.

Dimension key: T tokens, N query heads, K key heads, H head dim, C pairs of channels (H / 2).
"""

from typing import NamedTuple, Protocol

import jax

from kernels_pallas.rms_norm.api import NormWeight


class Angles(NamedTuple):
    """Cosine and sine of each token's angles, f32[T, C]."""

    cos_TC: jax.Array
    sin_TC: jax.Array


class HeadNorms(NamedTuple):
    """RMSNorms over the channels of each head, of queries and of keys."""

    query: NormWeight
    key: NormWeight


class Rope(Protocol):
    """Normalises and rotates the heads of queries and keys."""

    def __call__(
        self, q_TNH: jax.Array, k_TKH: jax.Array, angles: Angles, norms: HeadNorms | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Pair the first half of each head's channels with the second and rotate the pairs, in f32.

        Args:
            q_TNH: queries.
            k_TKH: keys.
            angles: angles of the rotation.
            norms: norms before the rotation, whose results are rounded to the dtype of queries and keys.

        Returns:
            Queries and keys in their dtype.
        """
        ...
