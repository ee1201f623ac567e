"""Sampling in portable XLA: the CPU path, and the pass over the logits that the kernels are compared with.

Work that no row of the step needs is skipped by `lax.cond`. The temperature is applied only to values that are
sampled from, listed or summed, since it does not change their order.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.sampling.api import SampleOutput, SamplingInputs, SamplingMode, SamplingState
from kernels_pallas.sampling.common.adjust import adjust_logits, without_padding
from kernels_pallas.sampling.common.combine import sample_with
from kernels_pallas.sampling.common.random import gumbel_noise
from kernels_pallas.sampling.common.row_blocks import blockwise_sum, first_largest, top_of_rows
from kernels_pallas.sampling.common.summary import (
    NUM_CANDIDATES,
    Best,
    Candidates,
    Shard,
    Summary,
    in_order,
    inverse_temperature,
    no_candidates,
    plan_sampling,
)
from kernels_pallas.sampling.common.threshold import threshold_search

# On CPU a longer list costs a fifth of a search, and it decides most filters that reach past the candidates.
_RETRY = 1024


def sample(
    logits_BV: jax.Array,
    inputs: SamplingInputs,
    state: SamplingState,
    shard: Shard | None = None,
    mode: SamplingMode = SamplingMode.ADJUSTED,
) -> SampleOutput:
    """Sample one token per row of f32 logits; see `combine.sample_with`."""
    shard = shard or Shard(logits_BV.shape[1])
    return sample_with(summarise, logits_BV, inputs, state, shard, mode)


def summarise(
    logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState, shard: Shard, mode: SamplingMode
) -> Summary:
    """See `summary.Summarise`."""
    if mode == SamplingMode.ADJUSTED:
        x_BV = adjust_logits(logits_BV, inputs, state, shard)
    else:
        x_BV = without_padding(logits_BV, shard)
    best = _best(x_BV, inputs, shard)
    if mode == SamplingMode.PLAIN:
        return Summary(best)
    candidates = lax.cond(
        jnp.any(plan_sampling(inputs, shard.vocab_size).listed_B),
        partial(_candidates, inputs=inputs, shard=shard),
        lambda x_BV, _: no_candidates(x_BV.shape[0]),
        x_BV,
        best.max_B,
    )
    search = threshold_search(logits_BV, inputs, state, shard, rows_at_once=1, retry=_RETRY)
    return Summary(best, candidates, search)


def _best(x_BV: jax.Array, inputs: SamplingInputs, shard: Shard) -> Best:
    plan = plan_sampling(inputs, shard.vocab_size)
    inverse_B = inverse_temperature(inputs)
    top_B, id_B = first_largest(x_BV)

    def noised(x_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
        id_1V = shard.first(x_BV.shape[1]) + jnp.arange(x_BV.shape[1])[None]
        noise_BV = gumbel_noise(inputs.seed_B2, inputs.position_B, id_1V)
        return first_largest(x_BV * inverse_B[:, None] + noise_BV)

    def not_noised(x_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.full(x_BV.shape[0], -jnp.inf, x_BV.dtype), jnp.zeros(x_BV.shape[0], jnp.int32)

    noised_B, noised_id_B = lax.cond(jnp.any(plan.noisy_B), noised, not_noised, x_BV)
    first = shard.first(x_BV.shape[1])
    top_B *= inverse_B
    return Best(top_B == jnp.inf, top_B, id_B + first, noised_B, noised_id_B + first)


def _candidates(x_BV: jax.Array, max_B: jax.Array, *, inputs: SamplingInputs, shard: Shard) -> Candidates:
    inverse_B1 = inverse_temperature(inputs)[:, None]
    size = x_BV.shape[1]
    count = min(NUM_CANDIDATES, size)
    # Sorted before temperature: values that differ after temperature also differ before it.
    value_BK, id_BK = top_of_rows(x_BV, count)
    # top_k orders -0 below 0, although they compare equal.
    value_BK, id_BK = lax.cond(jnp.any(value_BK == 0), in_order, lambda *unchanged: unchanged, value_BK, id_BK)
    value_BK *= inverse_B1
    bound_B = value_BK[:, -1] if count < size else jnp.full_like(max_B, -jnp.inf)
    padding = ((0, 0), (0, NUM_CANDIDATES - count))
    sum_B = blockwise_sum(jnp.exp(x_BV * inverse_B1 - max_B[:, None]))
    return Candidates(
        jnp.pad(value_BK, padding, constant_values=-jnp.inf),
        jnp.pad(id_BK + shard.first(size), padding),
        bound_B,
        jnp.where(max_B == -jnp.inf, 0.0, sum_B),
    )
