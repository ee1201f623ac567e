"""From the shards' summaries to sampled tokens. Plain XLA, shared by every implementation.

Summaries cross the mesh: `NUM_CANDIDATES` values and ids and a few scalars per row and shard. Rows that the
candidates do not decide, according to the check in `filters`, are sampled exactly by the platform's search.

Dimension key: B rows of logits, V the shard's ids, K candidates of all shards, N shards.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.sampling.api import NUM_TOP_LOGPROBS, SampleOutput, SamplingInputs, SamplingMode, SamplingState
from kernels_pallas.sampling.common.adjust import values_of
from kernels_pallas.sampling.common.filters import sample_from_candidates
from kernels_pallas.sampling.common.search import Exact, Known
from kernels_pallas.sampling.common.summary import Best, Candidates, Plan, Shard, Summarise, Summary, plan_sampling

T = TypeVar("T")


def sample_with(
    summarise: Summarise,
    logits_BV: jax.Array,
    inputs: SamplingInputs,
    state: SamplingState,
    shard: Shard,
    mode: SamplingMode,
) -> SampleOutput:
    """Sample one token per row of f32 logits.

    Args:
        summarise: the platform's pass over the logits.
        logits_BV: f32[B, V], the shard's logits; `state.counts_RV` covers the same ids, the other arrays are not split.
        inputs: one entry per row, the same on every shard.
        state: per-request state rows.
        shard: the ids that the logits cover.
        mode: what the rows need at most.
    """
    summary = summarise(logits_BV, inputs, state, shard, mode)
    if mode == SamplingMode.PLAIN:
        # A target is never sampled, and its log-probability is only returned with `logprobs_B`, which needs a list.
        return _sample_plain(summary, inputs, shard)
    value_of = partial(values_of, logits_BV=logits_BV, inputs=inputs, state=state, shard=shard)
    return _sample_listed(summary, inputs, shard, value_of)


def _sample_plain(summary: Summary, inputs: SamplingInputs, shard: Shard) -> SampleOutput:
    """Sample a step whose rows are all greedy or unfiltered, from unadjusted logits."""
    best = _merge_best(_gather(summary.best, shard))
    plan = plan_sampling(inputs, shard.vocab_size)
    shape = (best.max_B.shape[0], NUM_TOP_LOGPROBS)
    return SampleOutput(
        _choose(best, plan, inputs, best.best_B),
        _finite(best),
        jnp.zeros_like(best.max_B),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, jnp.float32),
    )


def _sample_listed(
    summary: Summary, inputs: SamplingInputs, shard: Shard, value_of: Callable[[jax.Array], jax.Array]
) -> SampleOutput:
    assert summary.candidates is not None
    assert summary.search is not None
    plan = plan_sampling(inputs, shard.vocab_size)
    parts, listed_parts = _gather((summary.best, summary.candidates), shard)
    best = _merge_best(parts)
    finite_B = _finite(best)
    candidates = _merge_candidates(parts, listed_parts, best)
    log_sum_B = best.max_B + jnp.log(candidates.sum_B)
    sampled = sample_from_candidates(candidates, log_sum_B, inputs)
    exact = Exact(sampled.token_B, candidates.id_BK[:, :NUM_TOP_LOGPROBS], candidates.value_BK[:, :NUM_TOP_LOGPROBS])
    known = Known(
        bound_B=candidates.bound_B,
        max_B=best.max_B,
        log_sum_B=log_sum_B,
        undecided_B=sampled.undecided_B & plan.filtered_B & finite_B,
        short_B=_too_few_for_logprobs(candidates) & inputs.logprobs_B & finite_B,
    )

    exact = summary.search(exact, known)
    token_B = _choose(best, plan, inputs, exact.token_B)
    logprob_B = value_of(token_B) - log_sum_B
    top_BJ = jnp.where(inputs.logprobs_B[:, None], exact.top_BJ - log_sum_B[:, None], 0.0)
    return SampleOutput(token_B, finite_B, logprob_B, exact.top_ids_BJ, top_BJ)


def _choose(best: Best, plan: Plan, inputs: SamplingInputs, filtered_B: jax.Array) -> jax.Array:
    sampled_B = jnp.where(plan.greedy_B, best.best_B, jnp.where(plan.noisy_B, best.noised_id_B, filtered_B))
    return jnp.where(inputs.target_B >= 0, inputs.target_B, sampled_B)


def _finite(best: Best) -> jax.Array:
    return ~best.bad_B & (best.max_B > -jnp.inf)


def _gather(tree: T, shard: Shard) -> T:
    """Gather each leaf [B, ...] of every shard as [N, B, ...], with one collective for all leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    if shard.axis_name is None:
        return treedef.unflatten([leaf[None] for leaf in leaves])
    rows = leaves[0].shape[0]
    words = [_as_words(leaf).reshape(rows, -1) for leaf in leaves]
    gathered_NBX = lax.all_gather(jnp.concatenate(words, axis=1), shard.axis_name)
    out: list[jax.Array] = []
    start = 0
    for leaf, word in zip(leaves, words, strict=True):
        part_NBX = gathered_NBX[:, :, start : start + word.shape[1]]
        start += word.shape[1]
        out.append(_from_words(part_NBX, leaf.dtype).reshape(-1, *leaf.shape))
    return treedef.unflatten(out)


def _as_words(x: jax.Array) -> jax.Array:
    return x.astype(jnp.int32) if x.dtype == jnp.bool_ else lax.bitcast_convert_type(x, jnp.int32)


def _from_words(words: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return words != 0 if dtype == jnp.bool_ else lax.bitcast_convert_type(words, dtype)


def _merge_best(parts: Best) -> Best:
    """Merge the shards. They cover ascending ids, so the first of equal maxima has the lowest id."""
    bad_NB, max_NB, best_NB, noised_NB, noised_id_NB = parts
    if bad_NB.shape[0] == 1:
        return jax.tree.map(lambda x: x[0], parts)
    sample_B = jnp.arange(max_NB.shape[1])
    best_B = best_NB[jnp.argmax(max_NB, axis=0), sample_B]
    noised_id_B = noised_id_NB[jnp.argmax(noised_NB, axis=0), sample_B]
    return Best(jnp.any(bad_NB, axis=0), jnp.max(max_NB, axis=0), best_B, jnp.max(noised_NB, axis=0), noised_id_B)


def _merge_candidates(best: Best, parts: Candidates, whole: Best) -> Candidates:
    """Merge the shards by a stable sort, which keeps equal values in order of id, as shards and their lists are."""
    shards, rows, count = parts.value_BK.shape
    if shards == 1:
        return jax.tree.map(lambda x: x[0], parts)
    value_BK, id_BK = (x.swapaxes(0, 1).reshape(rows, shards * count) for x in (parts.value_BK, parts.id_BK))
    # top_k would order -0 below 0, although they compare equal.
    value_BK, order_BK = lax.top_k(jnp.where(value_BK == 0, 0.0, value_BK), shards * count)
    # A shard without an allowed token has no mass; -inf - -inf would be NaN.
    scale_NB = jnp.where(best.max_B == -jnp.inf, 0.0, jnp.exp(best.max_B - whole.max_B))
    sum_B = jnp.sum(parts.sum_B * scale_NB, axis=0)
    return Candidates(value_BK, jnp.take_along_axis(id_BK, order_BK, axis=1), jnp.max(parts.bound_B, axis=0), sum_B)


def _too_few_for_logprobs(candidates: Candidates) -> jax.Array:
    last_B = candidates.value_BK[:, NUM_TOP_LOGPROBS - 1]
    return (last_B <= candidates.bound_B) & (candidates.bound_B > -jnp.inf)
