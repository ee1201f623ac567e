"""Drawing the next token: the types that every implementation shares.

Order of operations on a row of logits: repetition, frequency and presence penalty -> mask -> bias -> forbidden
tokens -> temperature -> top-k and top-p on the same sorted softmax -> min-p -> draw. The draw is Gumbel-max with
noise that is a pure function of (seed, position, token id), so a row's token depends on no neighbour, batch size or
sharding.

Dimension key: B rows of logits, R rows of per-request state, V vocabulary, J entries of a padded sparse list, W words
of a mask.
"""

from typing import NamedTuple

import jax

NUM_TOP_LOGPROBS = 20
MASK_BITS = 32


def mask_words(vocab_size: int) -> int:
    """W: 32-bit words that hold one bit per token."""
    return -(-vocab_size // MASK_BITS)


class SamplingInputs(NamedTuple):
    """One entry per draw. Padding draws use the neutral values and the spare state row.

    Attributes:
        row_B: i32 index into `SamplingState`; the last row is spare and neutral.
        target_B: i32 token whose log-probability is wanted in place of a draw, or -1.
        position_B: i32 position in its sequence of the token to draw.
        seed_B2: u32[B, 2] low and high half of the seed.
        temperature_B: f32; 0 is greedy.
        top_k_B: i32, at least 1; the vocabulary size keeps all.
        top_p_B, min_p_B: f32.
        frequency_B, presence_B, repetition_B: f32 penalties.
        biased_B: bool, the row of `bias` applies.
        forbid_stops_B: bool, the row of `stop_ids` is forbidden.
        logprobs_B: bool, log-probabilities are wanted.
        masked_B: bool, the draw's row of the mask applies.
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
    """What the device keeps per row between steps.

    Attributes:
        counts_RV: i32, how often each token is in the row's output.
        bias_ids_RJ, bias_values_RJ: i32 and f32 logit bias, -inf forbids; unused entries have id V.
        stop_ids_RJ: i32 tokens that `min_tokens` forbids; unused entries have id V.
    """

    counts_RV: jax.Array
    bias_ids_RJ: jax.Array
    bias_values_RJ: jax.Array
    stop_ids_RJ: jax.Array


class SampleOutput(NamedTuple):
    """What was drawn.

    Attributes:
        token_B: i32, the drawn token, or the target.
        finite_B: bool, False where a logit was NaN or +inf or no token was allowed: the token means nothing.
        logprob_B: f32 log-probability of the token after penalties, mask, bias and temperature, before top-k, top-p and
            min-p; 0 unless a draw of the step wanted it.
        top_ids_BJ, top_logprobs_BJ: the `NUM_TOP_LOGPROBS` likeliest tokens, in order; zeros unless wanted.
    """

    token_B: jax.Array
    finite_B: jax.Array
    logprob_B: jax.Array
    top_ids_BJ: jax.Array
    top_logprobs_BJ: jax.Array
