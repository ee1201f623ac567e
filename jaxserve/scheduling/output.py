"""Turns the results of a step into updates for clients."""

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from jaxserve.request import FinishReason, TokenDelta, TokenLogprobs
from jaxserve.scheduling.sequence import Sequence
from jaxserve.step import PromptLogprobs, StepOutput


class NewToken(NamedTuple):
    """An output token, with its log-probabilities if the request asks for them."""

    id: int
    logprobs: TokenLogprobs | None


def sampled_token(sequence: Sequence, index: int, output: StepOutput) -> NewToken:
    """Return the token that a step sampled for the row at `index`."""
    token_id = int(output.token_ids_B[index])
    count = sequence.request.sampling.num_logprobs
    if count is None or output.top_ids_BJ is None or output.top_logprobs_BJ is None:
        return NewToken(token_id, None)
    top_ids = tuple(output.top_ids_BJ[index, :count].tolist())
    top_logprobs = tuple(output.top_logprobs_BJ[index, :count].tolist())
    return NewToken(token_id, TokenLogprobs(float(output.logprobs_B[index]), top_ids, top_logprobs))


def forced_token(sequence: Sequence, token_id: int) -> NewToken:
    """Return a token that a constraint forces; its probability is 1."""
    count = sequence.request.sampling.num_logprobs
    if count is None:
        return NewToken(token_id, None)
    return NewToken(token_id, TokenLogprobs(0.0, (token_id,)[:count], (0.0,)[:count]))


def add_prompt_logprobs(sequence: Sequence, prompt: PromptLogprobs) -> None:
    """Append a step's log-probabilities of prompt tokens to those of earlier steps."""
    count = sequence.request.sampling.num_logprobs or 0
    sequence.prompt_logprobs.extend(
        TokenLogprobs(float(logprob), tuple(ids[:count].tolist()), tuple(values[:count].tolist()))
        for logprob, ids, values in zip(prompt.logprobs_C, prompt.top_ids_CJ, prompt.top_logprobs_CJ, strict=True)
    )


def make_delta(
    sequence: Sequence,
    new: SequenceOf[NewToken],
    reason: FinishReason | None,
    *,
    error: str | None = None,
    refused: bool = False,
) -> TokenDelta:
    """Return the update for a client after new tokens were appended, or when the sequence ends."""
    last = new[-1].id if new else -1
    return TokenDelta(
        request_id=sequence.request.id,
        choice=sequence.choice,
        token_ids=tuple(token.id for token in new),
        logprobs=tuple(token.logprobs for token in new if token.logprobs is not None),
        prompt_logprobs=tuple(sequence.prompt_logprobs) if sequence.num_known_output_tokens == len(new) else (),
        finish_reason=reason,
        matched_stop=last if reason is FinishReason.STOP and sequence.stops_at(last) else None,
        num_cached_tokens=sequence.num_cached_tokens or 0,
        error=error,
        refused=refused,
    )
