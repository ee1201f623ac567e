"""Summary of one pass over a shard's logits: the values that are gathered across shards and sampled from.

Dimension key: B rows of logits, V the shard's ids, K candidates.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.sampling.api import NUM_TOP_LOGPROBS, SamplingInputs, SamplingMode, SamplingState
from kernels_pallas.sampling.common.search import Search

NUM_CANDIDATES = 128


class Shard(NamedTuple):
    """The part of the vocabulary that the logits cover: ids [first, first + V).

    Attributes:
        vocab_size: size of the whole vocabulary; the last shards may hold padding past it.
        axis_name: mesh axis, or axes, over which the vocabulary is split; None if it is not split.
    """

    vocab_size: int
    axis_name: str | tuple[str, ...] | None = None

    def num_shards(self) -> int:
        """Return the number of shards."""
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    def first(self, size: int) -> jax.Array:
        """Return the first id of this shard of `size` ids, i32[]."""
        return jnp.int32(0) if self.axis_name is None else lax.axis_index(self.axis_name) * jnp.int32(size)


class Best(NamedTuple):
    """The largest values of one shard or of the whole vocabulary. Values are adjusted logits over temperature.

    Attributes:
        bad_B: bool, the values contain NaN or +inf, which makes the other fields meaningless.
        max_B: f32, the largest value; -inf where no token is allowed.
        best_B: i32, lowest id of the largest value.
        noised_B, noised_id_B: f32 and i32, the largest value plus noise and its lowest id; only for rows that are
            neither greedy nor filtered.
    """

    bad_B: jax.Array
    max_B: jax.Array
    best_B: jax.Array
    noised_B: jax.Array
    noised_id_B: jax.Array


class Candidates(NamedTuple):
    """The likeliest tokens, in order; equal values in ascending order of id.

    Attributes:
        value_BK, id_BK: f32 and i32; the ids of values of -inf are meaningless.
        bound_B: f32; all tokens with a value above it are candidates; -inf means that all tokens are.
        sum_B: f32, sum of exp(value - max) over all tokens.
    """

    value_BK: jax.Array
    id_BK: jax.Array
    bound_B: jax.Array
    sum_B: jax.Array


class Plan(NamedTuple):
    """The work that each row of the step needs.

    Attributes:
        greedy_B: bool, sampled without noise, or a target, which is not sampled.
        filtered_B: bool, sampled from the tokens that top-k, top-p and min-p keep.
        noisy_B: bool, sampled from the whole vocabulary.
        listed_B: bool, needs candidates.
        adjusted_B: bool, needs penalties, mask, bias or forbidden stops.
    """

    greedy_B: jax.Array
    filtered_B: jax.Array
    noisy_B: jax.Array
    listed_B: jax.Array
    adjusted_B: jax.Array


class Summary(NamedTuple):
    """Result of the pass over the shard's logits; in plain mode only `best`.

    Attributes:
        best: the shard's largest values.
        candidates: the shard's likeliest tokens.
        search: finds the tokens of rows that the candidates of all shards do not decide.
    """

    best: Best
    candidates: Candidates | None = None
    search: Search | None = None


class Summarise(Protocol):
    """One pass over the shard's logits."""

    def __call__(
        self, logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState, shard: Shard, mode: SamplingMode
    ) -> Summary:
        """Return the shard's summary."""
        ...


def sampling_mode(inputs: SamplingInputs, vocab_size: int) -> SamplingMode:
    """Return the mode that suffices for all rows, from arrays on the host."""
    plan = plan_sampling(inputs, vocab_size)
    if np.any(plan.adjusted_B):
        return SamplingMode.ADJUSTED
    return SamplingMode.LISTED if np.any(plan.listed_B) else SamplingMode.PLAIN


def plan_sampling(inputs: SamplingInputs, vocab_size: int) -> Plan:
    """Classify the rows by the work they need; arrays of jax or numpy."""
    greedy_B = (inputs.temperature_B == 0) | (inputs.top_k_B == 1) | (inputs.target_B >= 0)
    narrowed_B = (inputs.top_k_B < vocab_size) | (inputs.top_p_B < 1) | (inputs.min_p_B > 0)
    filtered_B = narrowed_B & ~greedy_B
    return Plan(
        greedy_B=greedy_B,
        filtered_B=filtered_B,
        noisy_B=~greedy_B & ~narrowed_B,
        listed_B=filtered_B | inputs.logprobs_B,
        adjusted_B=penalised(inputs) | inputs.masked_B | inputs.biased_B | inputs.forbid_stops_B,
    )


def penalised(inputs: SamplingInputs) -> jax.Array:
    """Return bool[B], whether any penalty is not neutral."""
    return (inputs.frequency_B != 0) | (inputs.presence_B != 0) | (inputs.repetition_B != 1)


def inverse_temperature(inputs: SamplingInputs) -> jax.Array:
    """Return 1 / temperature, f32[B], or 1 where greedy; all implementations multiply by it and so round alike."""
    return 1.0 / jnp.where(inputs.temperature_B == 0, 1.0, inputs.temperature_B)


def unbounded_top_p(inputs: SamplingInputs) -> jax.Array:
    """Return top-p, f32[B], but inf for 1, which keeps all tokens however the total mass rounds."""
    return jnp.where(inputs.top_p_B >= 1, jnp.inf, inputs.top_p_B)


def in_order(value_BK: jax.Array, id_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sort by descending value; equal values, including 0 and -0, by ascending id."""
    negated_BK, id_BK = lax.sort((-value_BK, id_BK), dimension=1, num_keys=2)
    return -negated_BK, id_BK


def no_candidates(rows: int) -> Candidates:
    """Return the candidates of a step in which no row needs them."""
    return Candidates(
        jnp.full((rows, NUM_CANDIDATES), -jnp.inf, jnp.float32),
        jnp.zeros((rows, NUM_CANDIDATES), jnp.int32),
        jnp.full(rows, jnp.inf, jnp.float32),
        jnp.ones(rows, jnp.float32),
    )


assert NUM_CANDIDATES >= NUM_TOP_LOGPROBS
