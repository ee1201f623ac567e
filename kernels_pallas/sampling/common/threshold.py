"""Search of the rows that the candidates do not decide, by bisection over the whole row. Plain XLA.

Each step of the bisection is one pass over the row and one sum over the shards.

Dimension key: B rows of logits, G of them processed together, V the shard's ids, J top log-probabilities, K candidates,
N shards.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.sampling.api import NUM_TOP_LOGPROBS, SamplingInputs, SamplingState
from kernels_pallas.sampling.common.adjust import adjust_logits
from kernels_pallas.sampling.common.bisection import (
    Edge,
    Limits,
    find_edge,
    find_last_id,
    image_below,
    image_of,
    unlikely,
    without_minus_zero,
)
from kernels_pallas.sampling.common.filters import sample_from_candidates
from kernels_pallas.sampling.common.random import gumbel_noise
from kernels_pallas.sampling.common.row_blocks import blockwise_sum, first_largest, top_of_rows
from kernels_pallas.sampling.common.search import Exact, Known, Search
from kernels_pallas.sampling.common.summary import Candidates, Shard, inverse_temperature, unbounded_top_p


class _Rows(NamedTuple):
    """The shard's part of G rows.

    Attributes:
        value_GV: f32, adjusted logits over temperature; never -0.
        image_GV: i32 images of the values, in the same order; see `image_of`.
        mass_GV: f32 probabilities.
        id_1V: i32 token ids.
    """

    value_GV: jax.Array
    image_GV: jax.Array
    mass_GV: jax.Array
    id_1V: jax.Array


def threshold_search(
    logits_BV: jax.Array,
    inputs: SamplingInputs,
    state: SamplingState,
    shard: Shard,
    *,
    rows_at_once: int,
    retry: int = 0,
) -> Search:
    """Return the search of rows in their logits; it costs nothing where all rows are decided.

    Args:
        logits_BV: f32[B, V], the shard's logits before any adjustment.
        inputs: one entry per row.
        state: per-request state rows.
        shard: the ids that the logits cover.
        rows_at_once: G, the number of rows to process together: 1 where a pass over a row is throughput-bound, more
            where it is latency-bound.
        retry: number of candidates to try before a search, where that is cheaper; 0 for none. Ignored if the vocabulary
            is split.
    """

    def search(found: Exact, known: Known) -> Exact:
        def redo(logits_BV: jax.Array, found: Exact) -> Exact:
            def sample_group(known: Known, row_G: jax.Array) -> Exact:
                inputs_G = jax.tree.map(lambda x: x[row_G], inputs)
                return _sample_group(known, logits_BV[row_G], inputs_G, state, shard, retry)

            return _redo_groups(found, known, sample_group, rows_at_once)

        any_undecided = jnp.any(known.undecided_B | known.short_B)
        return lax.cond(any_undecided, redo, lambda _, found: found, logits_BV, found)

    return search


def _redo_groups(
    found: Exact, known: Known, sample_group: Callable[[Known, jax.Array], Exact], rows_at_once: int
) -> Exact:
    any_B = known.undecided_B | known.short_B
    size = min(rows_at_once, any_B.shape[0])
    count = jnp.sum(any_B)
    # Rows to redo come first; the last group may repeat rows, which yields the same results.
    order_B = jnp.argsort(~any_B, stable=True)

    def group(carry: tuple[jax.Array, Exact]) -> tuple[jax.Array, Exact]:
        start, found = carry
        row_G = lax.dynamic_slice_in_dim(order_B, start, size)
        known_G, old = jax.tree.map(lambda x: x[row_G], (known, found))
        new = sample_group(known_G, row_G)
        token_G = jnp.where(known_G.undecided_B, new.token_B, old.token_B)
        keep_G1 = ~known_G.short_B[:, None]
        top_ids_GJ = jnp.where(keep_G1, old.top_ids_BJ, new.top_ids_BJ)
        new = Exact(token_G, top_ids_GJ, jnp.where(keep_G1, old.top_BJ, new.top_BJ))
        return start + size, jax.tree.map(lambda x, y: x.at[row_G].set(y), found, new)

    return lax.while_loop(lambda carry: carry[0] < count, group, (jnp.int32(0), found))[1]


def _sample_group(
    known: Known, logits_GV: jax.Array, inputs: SamplingInputs, state: SamplingState, shard: Shard, retry: int
) -> Exact:
    value_GV = adjust_logits(logits_GV, inputs, state, shard) * inverse_temperature(inputs)[:, None]
    value_GV = without_minus_zero(value_GV)
    if retry and retry < value_GV.shape[1] and shard.axis_name is None:
        token_G = _sample_from_more(value_GV, known, inputs, shard, retry)
    else:
        token_G = _search(value_GV, known, inputs, shard)
    top_ids_GJ, top_GJ = lax.cond(jnp.any(known.short_B), partial(_top, shard=shard), _no_top, value_GV)
    return Exact(token_G, top_ids_GJ, top_GJ)


def _sample_from_more(value_GV: jax.Array, known: Known, inputs: SamplingInputs, shard: Shard, count: int) -> jax.Array:
    """Sample i32[G] from the `count` likeliest tokens; rows that these do not decide need a search."""
    value_GK, id_GK = top_of_rows(value_GV, count)
    candidates = Candidates(value_GK, id_GK, value_GK[:, -1], jnp.ones_like(known.log_sum_B))
    sampled = sample_from_candidates(candidates, known.log_sum_B, inputs)

    def search(value_GV: jax.Array) -> jax.Array:
        token_G = _search(value_GV, known._replace(bound_B=candidates.bound_B), inputs, shard)
        return jnp.where(sampled.undecided_B, token_G, sampled.token_B)

    return lax.cond(jnp.any(sampled.undecided_B), search, lambda _: sampled.token_B, value_GV)


def _search(value_GV: jax.Array, known: Known, inputs: SamplingInputs, shard: Shard) -> jax.Array:
    """Sample i32[G] exactly, by bisection."""
    id_1V = (shard.first(value_GV.shape[1]) + jnp.arange(value_GV.shape[1], dtype=jnp.int32))[None]
    rows = _Rows(value_GV, image_of(value_GV), jnp.exp(value_GV - known.log_sum_B[:, None]), id_1V)
    limits = Limits(inputs.top_k_B, unbounded_top_p(inputs))

    def above(image_G: jax.Array) -> tuple[jax.Array, jax.Array]:
        above_GV = rows.image_GV > image_G[:, None]
        count_G, mass_G = _sums((above_GV.astype(jnp.float32), jnp.where(above_GV, rows.mass_GV, 0.0)), shard)
        # Counts stay below 2**24, so they are exact in f32.
        return count_G.astype(jnp.int32), mass_G

    high_G = image_of(without_minus_zero(known.bound_B))
    unlikely_G = unlikely(limits, inputs.min_p_B, known.max_B, known.log_sum_B, shard.vocab_size)
    low_G = jnp.maximum(image_below(_smallest(value_GV, shard)), image_of(without_minus_zero(unlikely_G)))
    edge = find_edge(above, low_G, high_G, limits)
    at_edge_GV = (rows.image_GV > edge.low[:, None]) & (rows.image_GV <= edge.high[:, None])

    def up_to(id_G: jax.Array) -> jax.Array:
        (count_G,) = _sums(((at_edge_GV & (rows.id_1V <= id_G[:, None])).astype(jnp.float32),), shard)
        return count_G.astype(jnp.int32)

    last_id_G = find_last_id(up_to, edge, limits, known.log_sum_B, shard.vocab_size)
    return _sample_kept(rows, edge, last_id_G, known, inputs, shard)


def _smallest(value_GV: jax.Array, shard: Shard) -> jax.Array:
    """Return the smallest value above -inf, f32[G]."""
    smallest_G = jnp.min(jnp.where(value_GV == -jnp.inf, jnp.inf, value_GV), axis=1)
    return smallest_G if shard.axis_name is None else lax.pmin(smallest_G, shard.axis_name)


def _sums(arrays_GV: tuple[jax.Array, ...], shard: Shard) -> tuple[jax.Array, ...]:
    """Sum rows over all shards, with one collective."""
    sums_G = tuple(blockwise_sum(x_GV) for x_GV in arrays_GV)
    return sums_G if shard.axis_name is None else lax.psum(sums_G, shard.axis_name)


def _sample_kept(
    rows: _Rows, edge: Edge, last_id_G: jax.Array, known: Known, inputs: SamplingInputs, shard: Shard
) -> jax.Array:
    """Sample i32[G] from the tokens that all filters keep."""
    at_edge_GV = (rows.image_GV > edge.low[:, None]) & (rows.id_1V <= last_id_G[:, None])
    least_G = inputs.min_p_B * jnp.exp(known.max_B - known.log_sum_B)
    kept_GV = ((rows.image_GV > edge.high[:, None]) | at_edge_GV) & (rows.mass_GV >= least_G[:, None])
    noised_GV = rows.value_GV + gumbel_noise(inputs.seed_B2, inputs.position_B, rows.id_1V)
    best_G, id_G = first_largest(jnp.where(kept_GV, noised_GV, -jnp.inf))
    id_G += shard.first(rows.value_GV.shape[1])
    if shard.axis_name is None:
        return id_G
    best_NG, id_NG = lax.all_gather((best_G, id_G), shard.axis_name)
    return jnp.take_along_axis(id_NG, jnp.argmax(best_NG, axis=0)[None], axis=0)[0]


def _top(value_GV: jax.Array, *, shard: Shard) -> tuple[jax.Array, jax.Array]:
    """Return the ids and values of the `NUM_TOP_LOGPROBS` largest values of all shards, in order."""
    count = min(NUM_TOP_LOGPROBS, value_GV.shape[1])
    top_GJ, ids_GJ = top_of_rows(value_GV, count)  # the values are never -0
    ids_GJ += shard.first(value_GV.shape[1])
    if shard.axis_name is not None:
        top_GJ, ids_GJ = lax.all_gather((top_GJ, ids_GJ), shard.axis_name, axis=1, tiled=True)
        top_GJ, order_GJ = lax.top_k(top_GJ, min(NUM_TOP_LOGPROBS, top_GJ.shape[1]))
        ids_GJ = jnp.take_along_axis(ids_GJ, order_GJ, axis=1)
    padding = ((0, 0), (0, NUM_TOP_LOGPROBS - top_GJ.shape[1]))
    return jnp.pad(ids_GJ, padding), jnp.pad(top_GJ, padding, constant_values=-jnp.inf)


def _no_top(value_GV: jax.Array) -> tuple[jax.Array, jax.Array]:
    shape = (value_GV.shape[0], NUM_TOP_LOGPROBS)
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
