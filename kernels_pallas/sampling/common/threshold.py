"""Exact top-k, top-p and min-p without a sort, for the rows that the candidates do not decide. Plain XLA.

Top-k and top-p keep a prefix of the row in order of value, so they amount to a threshold: whether a token of value t is
kept follows from the count and the mass of the tokens above t. The threshold is found by bisection; each step is one
pass over the row and one sum over the shards. Equal values at the threshold are cut by id, by a second bisection.

Dimension key: B rows of logits, G of them processed together, V the shard's ids, J top log-probabilities, K candidates,
N shards.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.sampling.api import NUM_TOP_LOGPROBS, SamplingInputs, SamplingState
from kernels_pallas.sampling.common.adjust import adjust_logits
from kernels_pallas.sampling.common.filters import sample_from_candidates
from kernels_pallas.sampling.common.random import gumbel_noise
from kernels_pallas.sampling.common.row_blocks import blockwise_sum, first_largest, top_of_rows
from kernels_pallas.sampling.common.summary import Candidates, Shard, inverse_temperature, unbounded_top_p

# Bisecting the range of values separates tokens fastest; bisecting the range of bit patterns always terminates.
_STEPS_BY_VALUE = 24
# Log-masses closer than this to a bound are left to the search, which applies the filters as defined.
_MARGIN = 0.01


class Exact(NamedTuple):
    """Sampled tokens and the largest values of each row.

    Attributes:
        token_B: i32.
        top_ids_BJ, top_BJ: i32 and f32, the `NUM_TOP_LOGPROBS` largest values, in order.
    """

    token_B: jax.Array
    top_ids_BJ: jax.Array
    top_BJ: jax.Array


class _Rows(NamedTuple):
    """The shard's part of G rows.

    Attributes:
        value_GV: f32, adjusted logits over temperature; never -0.
        image_GV: i32 images of the values, in the same order; see `_image`.
        mass_GV: f32 probabilities.
        id_1V: i32 token ids.
    """

    value_GV: jax.Array
    image_GV: jax.Array
    mass_GV: jax.Array
    id_1V: jax.Array


class Known(NamedTuple):
    """Results of the pass over the rows.

    Attributes:
        bound_B: f32; where undecided, the filters keep all larger values.
        max_B: f32, the largest value.
        log_sum_B: f32, log of the sum of exp.
        undecided_B: bool, the token is not decided yet.
        short_B: bool, the `NUM_TOP_LOGPROBS` largest values are not decided yet.
    """

    bound_B: jax.Array
    max_B: jax.Array
    log_sum_B: jax.Array
    undecided_B: jax.Array
    short_B: jax.Array


def sample_exactly(
    found: Exact,
    known: Known,
    logits_BV: jax.Array,
    inputs: SamplingInputs,
    state: SamplingState,
    shard: Shard,
    *,
    rows_at_once: int,
    retry: int,
) -> Exact:
    """Redo the undecided rows from their logits.

    Args:
        found: results so far, which the other rows keep.
        known: results of the pass over all rows.
        logits_BV: f32[B, V], the shard's logits before any adjustment.
        inputs: one entry per row.
        state: per-request state rows.
        shard: the ids that the logits cover.
        rows_at_once: G, the number of rows to process together.
        retry: number of candidates to try before a search; 0 for none. Ignored if the vocabulary is split.
    """
    any_B = known.undecided_B | known.short_B
    size = min(rows_at_once, any_B.shape[0])
    count = jnp.sum(any_B)
    # Rows to redo come first; the last group may repeat rows, which yields the same results.
    order_B = jnp.argsort(~any_B, stable=True)

    def group(carry: tuple[jax.Array, Exact]) -> tuple[jax.Array, Exact]:
        start, found = carry
        row_G = lax.dynamic_slice_in_dim(order_B, start, size)
        inputs_G, known_G, old = jax.tree.map(lambda x: x[row_G], (inputs, known, found))
        new = _sample_group(known_G, logits_BV[row_G], inputs_G, state, shard, retry)
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
    # -0 and 0 compare equal, so they must have the same image.
    value_GV = jnp.where(value_GV == 0, 0.0, value_GV)
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
    rows = _Rows(value_GV, _image(value_GV), jnp.exp(value_GV - known.log_sum_B[:, None]), id_1V)
    edge = _find_edge(rows, known, inputs, shard)
    last_id_G = _find_last_id(rows, edge, known, inputs, shard)
    return _sample_kept(rows, edge, last_id_G, known, inputs, shard)


def _image(value: jax.Array) -> jax.Array:
    """Map f32 values to i32 in the same order; on the bits, the map is its own inverse."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _from_image(image: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(image ^ ((image >> 31) & jnp.int32(0x7FFFFFFF)), jnp.float32)


def _sums(arrays_GV: tuple[jax.Array, ...], shard: Shard) -> tuple[jax.Array, ...]:
    """Sum rows over all shards, with one collective."""
    sums_G = tuple(blockwise_sum(x_GV) for x_GV in arrays_GV)
    return sums_G if shard.axis_name is None else lax.psum(sums_G, shard.axis_name)


class _Edge(NamedTuple):
    """Bounds on a row's threshold, i32 and f32[G]: images above `high` are kept, images up to `low` are not.

    Attributes:
        low_G, high_G: images; after the search, the tokens in between are none, one, or several of equal value.
        count_above_G, mass_above_G: count and mass of the tokens above `high`.
        count_between_G: number of tokens above `low` and up to `high`.
    """

    low_G: jax.Array
    high_G: jax.Array
    count_above_G: jax.Array
    mass_above_G: jax.Array
    count_between_G: jax.Array


def _find_edge(rows: _Rows, known: Known, inputs: SamplingInputs, shard: Shard) -> _Edge:
    top_p_G = unbounded_top_p(inputs)

    def above(image_G: jax.Array) -> tuple[jax.Array, jax.Array]:
        above_GV = rows.image_GV > image_G[:, None]
        count_G, mass_G = _sums((above_GV.astype(jnp.float32), jnp.where(above_GV, rows.mass_GV, 0.0)), shard)
        # Counts stay below 2**24, so they are exact in f32.
        return count_G.astype(jnp.int32), mass_G

    def open_(edge: _Edge) -> jax.Array:
        # The difference of two images may overflow i32: compare, never subtract.
        return (edge.count_between_G > 1) & (edge.low_G + 1 < edge.high_G)

    def step(carry: tuple[jax.Array, _Edge]) -> tuple[jax.Array, _Edge]:
        index, edge = carry
        middle_G = _middle(edge.low_G, edge.high_G, index < _STEPS_BY_VALUE)
        count_G, mass_G = above(middle_G)
        kept_G = (count_G < inputs.top_k_B) & (mass_G <= top_p_G)
        count_high_low_G = edge.count_above_G + edge.count_between_G
        lower = _Edge(edge.low_G, middle_G, count_G, mass_G, count_high_low_G - count_G)
        upper = edge._replace(low_G=middle_G, count_between_G=count_G - edge.count_above_G)
        # A finished row stays as it is while other rows continue.
        new = jax.tree.map(lambda x, y: jnp.where(kept_G, x, y), lower, upper)
        return index + 1, jax.tree.map(lambda x, y: jnp.where(open_(edge), x, y), new, edge)

    high_G = _image(jnp.where(known.bound_B == 0, 0.0, known.bound_B))
    low_G = jnp.minimum(_image(_lower_bound(rows, known, inputs, shard)), high_G - 1)
    count_G, mass_G = above(high_G)
    count_low_G, mass_low_G = above(low_G)
    # Where min-p gives the lower bound, top-k and top-p may keep everything above it.
    all_kept_G = (count_low_G < inputs.top_k_B) & (mass_low_G <= top_p_G)
    edge = _Edge(
        low_G,
        jnp.where(all_kept_G, low_G, high_G),
        jnp.where(all_kept_G, count_low_G, count_G),
        jnp.where(all_kept_G, mass_low_G, mass_G),
        jnp.where(all_kept_G, 0, count_low_G - count_G),
    )
    return lax.while_loop(lambda carry: jnp.any(open_(carry[1])), step, (jnp.int32(0), edge))[1]


def _lower_bound(rows: _Rows, known: Known, inputs: SamplingInputs, shard: Shard) -> jax.Array:
    """Return f32[G], a value below all kept tokens: the lower bound of the search."""
    smallest_G = jnp.min(jnp.where(rows.value_GV == -jnp.inf, jnp.inf, rows.value_GV), axis=1)
    if shard.axis_name is not None:
        smallest_G = lax.pmin(smallest_G, shard.axis_name)
    below_all_G = _from_image(_image(jnp.where(smallest_G == 0, 0.0, smallest_G)) - 1)
    # Tokens with a mass of at most (1 - p) / V have at most a mass of 1 - p together.
    by_top_p_G = known.log_sum_B + jnp.log(jnp.maximum(1 - inputs.top_p_B, 0.0) / shard.vocab_size) - _MARGIN
    by_min_p_G = known.max_B + jnp.log(inputs.min_p_B) - _MARGIN
    return jnp.maximum(below_all_G, jnp.maximum(by_top_p_G, by_min_p_G))


def _middle(low: jax.Array, high: jax.Array, by_value: jax.Array) -> jax.Array:
    """Return an image between two others, distinct from both if there is one."""
    halves = (low >> 1) + (high >> 1) + (low & high & 1)
    mean = 0.5 * _from_image(low) + 0.5 * _from_image(high)
    mean = jnp.clip(_image(jnp.where(mean == 0, 0.0, mean)), low + 1, high - 1)
    return jnp.where(by_value, mean, halves)


def _find_last_id(rows: _Rows, edge: _Edge, known: Known, inputs: SamplingInputs, shard: Shard) -> jax.Array:
    """Return the last id to keep of the tokens at the threshold, i32[G]: lowest ids are kept first, while they fit."""
    mass_G = jnp.exp(_from_image(edge.high_G) - known.log_sum_B)
    by_top_p_G = jnp.floor((unbounded_top_p(inputs) - edge.mass_above_G) / mass_G) + 1
    # The first token at the threshold is kept, whatever the sums round to; else the threshold would be higher.
    by_top_p_G = jnp.clip(by_top_p_G, 1, shard.vocab_size).astype(jnp.int32)
    fits_G = jnp.minimum(by_top_p_G, inputs.top_k_B - edge.count_above_G)
    between_GV = (rows.image_GV > edge.low_G[:, None]) & (rows.image_GV <= edge.high_G[:, None])

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_G, high_G = carry
        middle_G = (low_G + high_G) // 2
        (up_to_G,) = _sums(((between_GV & (rows.id_1V <= middle_G[:, None])).astype(jnp.float32),), shard)
        fit_G = up_to_G.astype(jnp.int32) <= fits_G
        return jnp.where(fit_G, middle_G, low_G), jnp.where(fit_G, high_G, middle_G)

    # Ids up to `low` fit, ids up to `high` do not; a row where all fit needs no search.
    all_fit_G = edge.count_between_G <= fits_G
    low_G = jnp.where(all_fit_G, shard.vocab_size - 1, -1)
    high_G = jnp.full_like(low_G, shard.vocab_size)
    return lax.while_loop(lambda carry: jnp.any(carry[0] + 1 < carry[1]), step, (low_G, high_G))[0]


def _sample_kept(
    rows: _Rows, edge: _Edge, last_id_G: jax.Array, known: Known, inputs: SamplingInputs, shard: Shard
) -> jax.Array:
    """Sample i32[G] from the tokens that all filters keep."""
    at_edge_GV = (rows.image_GV > edge.low_G[:, None]) & (rows.id_1V <= last_id_G[:, None])
    least_G = inputs.min_p_B * jnp.exp(known.max_B - known.log_sum_B)
    kept_GV = ((rows.image_GV > edge.high_G[:, None]) | at_edge_GV) & (rows.mass_GV >= least_G[:, None])
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
