"""Sampling in portable XLA.

Work that no row of the step asks for is skipped by `lax.cond`: a greedy step is an argmax. Top-k, top-p and min-p
look at the likeliest tokens of a tier; a row whose filter reaches further is drawn from the next tier, and last
from a full sort, so the result is exact either way and depends on the row alone.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.sampling.api import MASK_BITS, NUM_TOP_LOGPROBS, SampleOutput, SamplingInputs, SamplingState
from kernels_pallas.sampling.random import gumbel_noise

# A nucleus rarely holds more than the first; the second still costs a tenth of a sort.
_CANDIDATE_TIERS = (128, 1024)
_ARGMAX_BLOCK = 512


def sample(logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState) -> SampleOutput:
    """Draw one token per row of f32 logits."""
    adjusted_B = _penalised(inputs) | inputs.masked_B | inputs.biased_B | inputs.forbid_stops_B | inputs.logprobs_B
    plain = jnp.all(_greedy(inputs) & ~adjusted_B & (inputs.target_B < 0))
    # Logits pass into one branch only: whatever a branch returns unchanged would be copied.
    return lax.cond(plain, _argmax_only, _sample, logits_BV, inputs, state)


def _penalised(inputs: SamplingInputs) -> jax.Array:
    return (inputs.frequency_B != 0) | (inputs.presence_B != 0) | (inputs.repetition_B != 1)


def _greedy(inputs: SamplingInputs) -> jax.Array:
    return (inputs.temperature_B == 0) | (inputs.top_k_B == 1) | (inputs.target_B >= 0)


def _argmax(x_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index of the largest entry, and the entry. A row with NaN gives NaN.

    The best block first, then the best entry in it: XLA's argmax on CPU is a scalar loop, its maximum is not.
    """
    num_rows, vocab_size = x_BV.shape
    size = math.gcd(vocab_size, _ARGMAX_BLOCK)
    x_BCS = x_BV.reshape(num_rows, -1, size)
    block_B = jnp.argmax(jnp.max(x_BCS, axis=-1), axis=-1)
    x_BS = jnp.take_along_axis(x_BCS, block_B[:, None, None], axis=1)[:, 0]
    entry_B1 = jnp.argmax(x_BS, axis=-1)[:, None]
    top_B = jnp.take_along_axis(x_BS, entry_B1, axis=-1)[:, 0]
    return (block_B * size + entry_B1[:, 0]).astype(jnp.int32), top_B


def _argmax_only(logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState) -> SampleOutput:
    token_B, top_B = _argmax(logits_BV)
    top_BJ, ids_BJ = _no_top_logits(logits_BV)
    return SampleOutput(token_B, jnp.isfinite(top_B), jnp.zeros_like(top_B), ids_BJ, top_BJ)


def _sample(logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState) -> SampleOutput:
    def unchanged(logits_BV: jax.Array, *_: object) -> jax.Array:
        return logits_BV

    logits_BV = lax.cond(jnp.any(_penalised(inputs)), _penalise, unchanged, logits_BV, inputs, state)
    logits_BV = lax.cond(jnp.any(inputs.masked_B), _mask, unchanged, logits_BV, inputs, state)
    logits_BV = lax.cond(jnp.any(inputs.biased_B), _add_bias, unchanged, logits_BV, inputs, state)
    logits_BV = lax.cond(jnp.any(inputs.forbid_stops_B), _forbid_stops, unchanged, logits_BV, inputs, state)
    greedy_B = _greedy(inputs)
    scaled_BV = logits_BV / jnp.where(inputs.temperature_B == 0, 1.0, inputs.temperature_B)[:, None]
    token_B, top_B = _argmax(scaled_BV)
    log_sum_B = top_B + jnp.log(jnp.sum(jnp.exp(scaled_BV - top_B[:, None]), axis=-1))
    drawn_B = lax.cond(jnp.all(greedy_B), lambda *_: token_B, _draw, scaled_BV, log_sum_B, inputs, ~greedy_B)
    chosen_B = jnp.where(inputs.target_B >= 0, inputs.target_B, jnp.where(greedy_B, token_B, drawn_B))
    top_BJ, ids_BJ = lax.cond(jnp.any(inputs.logprobs_B), _top_logits, _no_top_logits, scaled_BV)
    logprob_B = jnp.take_along_axis(scaled_BV, chosen_B[:, None], axis=-1)[:, 0] - log_sum_B
    # The maximum passes NaN on, so one comparison finds NaN, +inf and a row with nothing left.
    return SampleOutput(chosen_B, jnp.isfinite(top_B), logprob_B, ids_BJ, top_BJ - log_sum_B[:, None])


def _penalise(logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState) -> jax.Array:
    counts_BV = state.counts_RV[inputs.row_B].astype(jnp.float32)
    repetition_B1 = inputs.repetition_B[:, None]
    repeated_BV = jnp.where(logits_BV < 0, logits_BV * repetition_B1, logits_BV / repetition_B1)
    logits_BV = jnp.where(counts_BV > 0, repeated_BV, logits_BV)
    presence_BV = jnp.where(counts_BV > 0, inputs.presence_B[:, None], 0.0)
    return logits_BV - inputs.frequency_B[:, None] * counts_BV - presence_BV


def _mask(logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState) -> jax.Array:
    bits_BWS = (inputs.mask_BW[:, :, None] >> jnp.arange(MASK_BITS)) & 1
    allowed_BV = bits_BWS.reshape(logits_BV.shape[0], -1)[:, : logits_BV.shape[1]] != 0
    return jnp.where(allowed_BV | ~inputs.masked_B[:, None], logits_BV, -jnp.inf)


def _add_bias(logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState) -> jax.Array:
    # Rows without a bias point at the neutral spare row.
    row_B = jnp.where(inputs.biased_B, inputs.row_B, state.bias_ids_RJ.shape[0] - 1)
    draw_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return logits_BV.at[draw_B1, state.bias_ids_RJ[row_B]].add(state.bias_values_RJ[row_B], mode="drop")


def _forbid_stops(logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState) -> jax.Array:
    row_B = jnp.where(inputs.forbid_stops_B, inputs.row_B, state.stop_ids_RJ.shape[0] - 1)
    draw_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return logits_BV.at[draw_B1, state.stop_ids_RJ[row_B]].set(-jnp.inf, mode="drop")


def _top_logits(scaled_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = min(NUM_TOP_LOGPROBS, scaled_BV.shape[1])
    top_BJ, ids_BJ = lax.top_k(scaled_BV, count)
    padding = ((0, 0), (0, NUM_TOP_LOGPROBS - count))
    return jnp.pad(top_BJ, padding), jnp.pad(ids_BJ.astype(jnp.int32), padding)


def _no_top_logits(scaled_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    shape = (scaled_BV.shape[0], NUM_TOP_LOGPROBS)
    return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)


def _draw(scaled_BV: jax.Array, log_sum_B: jax.Array, inputs: SamplingInputs, wanted_B: jax.Array) -> jax.Array:
    vocab_size = scaled_BV.shape[1]
    filtered_B = (inputs.top_k_B < vocab_size) | (inputs.top_p_B < 1) | (inputs.min_p_B > 0)

    def from_all(scaled_BV: jax.Array) -> jax.Array:
        token_1V = jnp.arange(vocab_size)[None, :]
        noise_BV = gumbel_noise(inputs.seed_B2, inputs.position_B, token_1V)
        return _argmax(scaled_BV + noise_BV)[0]

    def none(scaled_BV: jax.Array) -> jax.Array:
        return jnp.zeros(scaled_BV.shape[0], jnp.int32)

    def from_filtered(scaled_BV: jax.Array) -> jax.Array:
        return _draw_filtered(scaled_BV, log_sum_B, inputs, filtered_B & wanted_B, _CANDIDATE_TIERS)

    all_B = lax.cond(jnp.any(wanted_B & ~filtered_B), from_all, none, scaled_BV)
    filtered_token_B = lax.cond(jnp.any(wanted_B & filtered_B), from_filtered, none, scaled_BV)
    return jnp.where(filtered_B, filtered_token_B, all_B)


def _draw_filtered(
    scaled_BV: jax.Array, log_sum_B: jax.Array, inputs: SamplingInputs, wanted_B: jax.Array, tiers: tuple[int, ...]
) -> jax.Array:
    """Draw from the likeliest tokens; where a filter reaches past them, from the next tier, and last from all."""
    vocab_size = scaled_BV.shape[1]
    if not tiers or tiers[0] >= vocab_size:
        return _draw_from_sorted(_sort(scaled_BV), log_sum_B, inputs).token_B
    top = _draw_from_sorted(_Candidates(*lax.top_k(scaled_BV, tiers[0])), log_sum_B, inputs)
    beyond_B = top.last_kept_B & wanted_B

    def from_next(scaled_BV: jax.Array) -> jax.Array:
        token_B = _draw_filtered(scaled_BV, log_sum_B, inputs, beyond_B, tiers[1:])
        return jnp.where(beyond_B, token_B, top.token_B)

    return lax.cond(jnp.any(beyond_B), from_next, lambda _: top.token_B, scaled_BV)


class _Candidates(NamedTuple):
    """Likeliest tokens first; equal logits in ascending order of id."""

    logit_BJ: jax.Array
    id_BJ: jax.Array


class _Drawn(NamedTuple):
    token_B: jax.Array
    last_kept_B: jax.Array


def _sort(scaled_BV: jax.Array) -> _Candidates:
    ids_BV = jnp.broadcast_to(jnp.arange(scaled_BV.shape[1], dtype=jnp.int32), scaled_BV.shape)
    negated_BV, ids_BV = lax.sort((-scaled_BV, ids_BV), dimension=-1, num_keys=1, is_stable=True)
    return _Candidates(-negated_BV, ids_BV)


def _draw_from_sorted(candidates: _Candidates, log_sum_B: jax.Array, inputs: SamplingInputs) -> _Drawn:
    """Filter and draw; `last_kept_B` tells that the filter may reach past the candidates."""
    mass_BJ = jnp.exp(candidates.logit_BJ - log_sum_B[:, None])
    mass_before_BJ = jnp.cumsum(mass_BJ, axis=-1) - mass_BJ
    kept_BJ = (
        (jnp.arange(mass_BJ.shape[1]) < inputs.top_k_B[:, None])
        & (mass_before_BJ <= inputs.top_p_B[:, None])
        & (mass_BJ >= inputs.min_p_B[:, None] * mass_BJ[:, :1])
    )
    noise_BJ = gumbel_noise(inputs.seed_B2, inputs.position_B, candidates.id_BJ)
    best_B1 = jnp.argmax(jnp.where(kept_BJ, candidates.logit_BJ + noise_BJ, -jnp.inf), axis=-1)[:, None]
    token_B = jnp.take_along_axis(candidates.id_BJ, best_B1, axis=-1)[:, 0]
    return _Drawn(token_B.astype(jnp.int32), kept_BJ[:, -1])
