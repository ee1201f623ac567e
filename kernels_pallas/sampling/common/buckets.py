"""Running summary of a row in the kernels: elementwise updates, and the reductions with which XLA finishes it.

A row is processed in chunks of `NUM_BUCKETS` ids. Everything is kept per position in the chunk (a bucket), so nothing
moves across lanes and no step depends on the data: per bucket the online maximum and sum of exp, the largest value with
noise, and the `DEPTH` largest values with their ids. A token that is not listed is at most as large as the smallest
listed value of its bucket; this gives the bound of the candidates.

Dimension key: B rows of logits, S splits of a row, P buckets (1024; on TPU also lanes), J depth, K candidates.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from kernels_pallas.sampling.common.random import gumbel
from kernels_pallas.sampling.common.row_blocks import top_of_rows
from kernels_pallas.sampling.common.summary import NUM_CANDIDATES, Best, Candidates, Shard, in_order

NUM_BUCKETS = 1024
# If ids are spread evenly, four of the 20 likeliest tokens share a bucket in one row of 220,000, and four of the 128
# likeliest in one of 100.
DEPTH = 4
# A maximum starts at a finite value: exp(-inf - -inf) would be NaN, which marks a bad row.
_LOWEST = float(jnp.finfo(jnp.float32).min)


class Lanes(NamedTuple):
    """Running maximum, its lowest id, and the sum of exp(value - maximum); all of one shape.

    NaN and +inf make the sum, and nothing else, NaN permanently; a sum of 0 means that no value was above -inf.
    """

    max: jax.Array
    id: jax.Array
    sum: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Self:
        """Return the summary of no values."""
        return cls(jnp.full(shape, _LOWEST, jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))

    def add(self, values: list[jax.Array], ids: list[jax.Array]) -> "Lanes":
        """Return the summary with more values added, whose ids must be larger; the sum is rescaled once."""
        high, high_id = self.max, self.id
        for value, token in zip(values, ids, strict=True):
            larger = value > high
            high, high_id = jnp.where(larger, value, high), jnp.where(larger, token, high_id)
        total = self.sum * jnp.exp(self.max - high)
        for value in values:
            total += jnp.exp(value - high)
        return Lanes(high, high_id, total)


class Noised(NamedTuple):
    """Running maximum of value plus noise and its lowest id."""

    max: jax.Array
    id: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Self:
        """Return the summary of no values."""
        return cls(jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32))

    def add(
        self, value: jax.Array, token: jax.Array, first: jax.Array, key: tuple[jax.Array, jax.Array, jax.Array]
    ) -> "Noised":
        """Return the summary with more values added.

        The noise is that of the id in the whole vocabulary, `token + first`; `key` is u32 seed halves and position.
        """
        noised = value + gumbel(key[:2], key[2], (token + first).astype(jnp.uint32))
        larger = noised > self.max
        return Noised(jnp.where(larger, noised, self.max), jnp.where(larger, token, self.id))


Levels = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]
"""`DEPTH` largest values, largest first, and their ids; of equal values the lowest ids, in order."""


def no_levels(shape: tuple[int, ...]) -> Levels:
    """Return levels without values."""
    return (jnp.full(shape, -jnp.inf, jnp.float32),) * DEPTH, (jnp.zeros(shape, jnp.int32),) * DEPTH


def insert(levels: Levels, value: jax.Array, token: jax.Array) -> Levels:
    """Insert more values, whose ids must be larger: 5 operations per level."""
    values: list[jax.Array] = []
    ids: list[jax.Array] = []
    for level, level_id in zip(*levels, strict=True):
        larger = value > level
        values.append(jnp.where(larger, value, level))
        ids.append(jnp.where(larger, token, level_id))
        value, token = jnp.where(larger, level, value), jnp.where(larger, level_id, token)
    return tuple(values), tuple(ids)


def _ranks_before(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> jax.Array:
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))


def _exchange(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    first = _ranks_before(a, b)
    return (
        (jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])),
        (jnp.where(first, b[0], a[0]), jnp.where(first, b[1], a[1])),
    )


def merge_levels(value_BSJP: jax.Array, id_BSJP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merge the splits into the largest values of each bucket, [B, J, P], by bitonic merges of pairs of splits."""
    while value_BSJP.shape[1] > 1:
        if value_BSJP.shape[1] % 2:
            padding = ((0, 0), (0, 1), (0, 0), (0, 0))
            value_BSJP = jnp.pad(value_BSJP, padding, constant_values=-jnp.inf)
            id_BSJP = jnp.pad(id_BSJP, padding)
        half = value_BSJP.shape[1] // 2
        pairs = [
            _exchange(
                (value_BSJP[:, :half, j], id_BSJP[:, :half, j]),
                (value_BSJP[:, half:, DEPTH - 1 - j], id_BSJP[:, half:, DEPTH - 1 - j]),
            )[0]
            for j in range(DEPTH)
        ]
        distance = DEPTH // 2
        while distance:
            for j in range(DEPTH):
                if not j & distance:
                    pairs[j], pairs[j + distance] = _exchange(pairs[j], pairs[j + distance])
            distance //= 2
        value_BSJP = jnp.stack([value for value, _ in pairs], axis=2)
        id_BSJP = jnp.stack([token for _, token in pairs], axis=2)
    return value_BSJP[:, 0], id_BSJP[:, 0]


def best_of(lanes_BP: Lanes, noised_BP: Noised, shard: Shard, size: int) -> tuple[Best, jax.Array]:
    """Reduce lanes to the shard's `Best` and the sum of exp(value - max), f32[B]."""
    sum_BP = lanes_BP.sum
    max_BP = jnp.where(sum_BP > 0, lanes_BP.max, -jnp.inf)
    max_B, best_B = _largest(max_BP, lanes_BP.id)
    sum_B = jnp.sum(jnp.where(sum_BP == 0, 0.0, sum_BP * jnp.exp(lanes_BP.max - max_B[:, None])), axis=1)
    noised_B, noised_id_B = _largest(*noised_BP)
    first = shard.first(size)
    return Best(jnp.any(jnp.isnan(sum_BP), axis=1), max_B, best_B + first, noised_B, noised_id_B + first), sum_B


def _largest(value_BP: jax.Array, id_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    value_B = jnp.max(value_BP, axis=1)
    id_B = jnp.min(jnp.where(value_BP == value_B[:, None], id_BP, jnp.iinfo(jnp.int32).max), axis=1)
    return value_B, jnp.where(id_B == jnp.iinfo(jnp.int32).max, 0, id_B)


def candidates_of(value_BJP: jax.Array, id_BJP: jax.Array, sum_B: jax.Array, shard: Shard, size: int) -> Candidates:
    """Select the likeliest tokens of all buckets, in order."""
    rows = value_BJP.shape[0]
    value_BK, index_BK = top_of_rows(value_BJP.reshape(rows, -1), NUM_CANDIDATES)
    id_BK = jnp.take_along_axis(id_BJP.reshape(rows, -1), index_BK, axis=1)
    bound_B = jnp.maximum(value_BK[:, -1], jnp.max(value_BJP[:, -1], axis=1))
    # Buckets are not ordered by id, so equal values may not be either; nor are 0 and -0, since top_k puts -0 last.
    value_BK, id_BK = in_order(value_BK, id_BK)
    return Candidates(value_BK, id_BK + shard.first(size), bound_B, sum_B)
