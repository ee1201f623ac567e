"""What one pass over a shard's logits leaves behind: all that is gathered and all that a draw is made from.

Dimension key: B rows of logits, V the shard's ids, K candidates.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.sampling.api import NUM_TOP_LOGPROBS, SamplingInputs, SamplingState

NUM_CANDIDATES = 128


class Shard(NamedTuple):
    """The part of the vocabulary that these logits are of: ids [first, first + V).

    Attributes:
        vocab_size: vocabulary size of the whole vocabulary; the last shards may hold padding past it.
        axis_name: mesh axis, or axes, the vocabulary is split over; None where it is whole.
    """

    vocab_size: int
    axis_name: str | tuple[str, ...] | None = None

    def num_shards(self) -> int:
        """Number of shards."""
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    def first(self, size: int) -> jax.Array:
        """i32[], first id of this shard of `size` ids."""
        return jnp.int32(0) if self.axis_name is None else lax.axis_index(self.axis_name) * jnp.int32(size)


class Best(NamedTuple):
    """One shard's or the whole vocabulary's likeliest tokens. Values are adjusted logits over temperature.

    Attributes:
        bad_B: bool, a NaN or +inf was among the values; the rest of the row means nothing.
        max_B: f32, -inf where no token is allowed.
        best_B: i32 lowest id of the largest value.
        noised_B, noised_id_B: f32 and i32, the largest value plus noise and its lowest id; only for draws
            that are neither greedy nor filtered.
    """

    bad_B: jax.Array
    max_B: jax.Array
    best_B: jax.Array
    noised_B: jax.Array
    noised_id_B: jax.Array


class Candidates(NamedTuple):
    """The likeliest tokens, in order; equal values in ascending order of id.

    Attributes:
        value_BK, id_BK: f32 and i32; the ids of values of -inf mean nothing.
        bound_B: f32; a token with a value above it is a candidate, and -inf says that all tokens are.
        sum_B: f32, sum over all tokens of exp(value - max).
    """

    value_BK: jax.Array
    id_BK: jax.Array
    bound_B: jax.Array
    sum_B: jax.Array


class Plan(NamedTuple):
    """Which of the step's draws want what.

    Attributes:
        greedy_B: bool, drawn without noise, or not drawn at all.
        filtered_B: bool, drawn from what top-k, top-p and min-p leave.
        noisy_B: bool, drawn from the whole row.
        listed_B: bool, needs candidates.
        adjusted_B: bool, logits are not read as they are.
    """

    greedy_B: jax.Array
    filtered_B: jax.Array
    noisy_B: jax.Array
    listed_B: jax.Array
    adjusted_B: jax.Array


class Summarise(Protocol):
    """One pass over the shard's logits. `listed` is static: without it candidates are None and nothing is adjusted."""

    def __call__(  # noqa: D102
        self, logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState, shard: Shard, *, listed: bool
    ) -> tuple[Best, Candidates | None]: ...


def plan_sampling(inputs: SamplingInputs, vocab_size: int) -> Plan:
    """Sort the draws by what they need."""
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
    """bool[B], some penalty is not neutral."""
    return (inputs.frequency_B != 0) | (inputs.presence_B != 0) | (inputs.repetition_B != 1)


def inverse_temperature(inputs: SamplingInputs) -> jax.Array:
    """f32[B], 1 where greedy. One multiplication in every implementation, so that they round alike."""
    return 1.0 / jnp.where(inputs.temperature_B == 0, 1.0, inputs.temperature_B)


def unbounded_top_p(inputs: SamplingInputs) -> jax.Array:
    """f32[B]; a top-p of 1 keeps all, however the sum of all mass rounds."""
    return jnp.where(inputs.top_p_B >= 1, jnp.inf, inputs.top_p_B)


def in_order(value_BK: jax.Array, id_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest values first; equal ones, as 0 and -0 are, in ascending order of id."""
    negated_BK, id_BK = lax.sort((-value_BK, id_BK), dimension=1, num_keys=2)
    return -negated_BK, id_BK


def no_candidates(rows: int) -> Candidates:
    """What a step gives of which no draw needs candidates."""
    return Candidates(
        jnp.full((rows, NUM_CANDIDATES), -jnp.inf, jnp.float32),
        jnp.zeros((rows, NUM_CANDIDATES), jnp.int32),
        jnp.full(rows, jnp.inf, jnp.float32),
        jnp.ones(rows, jnp.float32),
    )


assert NUM_CANDIDATES >= NUM_TOP_LOGPROBS
