"""Sampling the next token: the types that every implementation shares.

Order of operations on a row of logits: repetition, frequency and presence penalties -> mask -> bias -> forbidden
tokens -> temperature -> top-k and top-p on the same sorted softmax -> min-p -> sampling. Sampling is Gumbel-max with
noise that is a pure function of (seed, position, token id), so a row's token does not depend on other rows, the batch
size or the sharding.

Dimension key: B rows of logits, R rows of per-request state, V vocabulary, J entries of a padded sparse list, W words
of a mask.
"""

from enum import IntEnum
from typing import NamedTuple

import jax

NUM_TOP_LOGPROBS = 20
MASK_BITS = 32


def mask_words(vocab_size: int) -> int:
    """Return W, the number of 32-bit words that hold one bit per token."""
    return -(-vocab_size // MASK_BITS)


class SamplingMode(IntEnum):
    """What the rows of a step need at most; the host chooses it, so that a program computes no more.

    Attributes:
        PLAIN: argmax, or sampling from the whole vocabulary.
        LISTED: also top-k, top-p and min-p, and log-probabilities.
        ADJUSTED: also penalties, masks, biases and forbidden stops.
    """

    PLAIN = 0
    LISTED = 1
    ADJUSTED = 2


class SamplingInputs(NamedTuple):
    """Sampling parameters, one entry per row of logits; padding uses neutral values and the spare state row.

    Attributes:
        row_B: i32 index into `SamplingState`; the last row is spare and neutral.
        target_B: i32 token to score instead of sampling one, or -1.
        position_B: i32 position of the sampled token in its sequence.
        seed_B2: u32[B, 2] low and high halves of the seed.
        temperature_B: f32; 0 is greedy.
        top_k_B: i32, at least 1; the vocabulary size disables top-k.
        top_p_B, min_p_B: f32.
        frequency_B, presence_B, repetition_B: f32 penalties.
        biased_B: bool, the logit bias of the state row applies.
        forbid_stops_B: bool, the `stop_ids` of the state row are forbidden.
        logprobs_B: bool, log-probabilities are requested.
        masked_B: bool, the row of `mask_BW` applies.
        mask_BW: i32; bit v % 32 of word v // 32 is set where token v is allowed.
    """

    row_B: jax.Array
    target_B: jax.Array
    position_B: jax.Array
    seed_B2: jax.Array
    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    frequency_B: jax.Array
    presence_B: jax.Array
    repetition_B: jax.Array
    biased_B: jax.Array
    forbid_stops_B: jax.Array
    logprobs_B: jax.Array
    masked_B: jax.Array
    mask_BW: jax.Array


class SamplingState(NamedTuple):
    """Per-row state that the device keeps between steps.

    Attributes:
        counts_RV: i32, number of times each token occurs in the row's output.
        bias_ids_RJ, bias_values_RJ: i32 and f32 logit bias; -inf forbids a token; unused entries have id V.
        stop_ids_RJ: i32 tokens that `min_tokens` forbids; unused entries have id V.
    """

    counts_RV: jax.Array
    bias_ids_RJ: jax.Array
    bias_values_RJ: jax.Array
    stop_ids_RJ: jax.Array


class SampleOutput(NamedTuple):
    """Sampled tokens and their log-probabilities.

    Attributes:
        token_B: i32, the sampled token, or the target.
        finite_B: bool, False where a logit is NaN or +inf or no token is allowed; the token is then meaningless.
        logprob_B: f32 log-probability of the token after penalties, mask, bias and temperature, before top-k, top-p and
            min-p; 0 in plain mode.
        top_ids_BJ, top_logprobs_BJ: the `NUM_TOP_LOGPROBS` likeliest tokens, in order; where they are not requested,
            the ids are meaningless and the log-probabilities are 0.
    """

    token_B: jax.Array
    finite_B: jax.Array
    logprob_B: jax.Array
    top_ids_BJ: jax.Array
    top_logprobs_BJ: jax.Array
