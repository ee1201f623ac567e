"""From token deltas to text: one request, its choices, and what clients are told of them.

Used by the HTTP API and by the offline `LLM` alike.
"""

from collections.abc import AsyncGenerator, AsyncIterable
from dataclasses import dataclass
from typing import NamedTuple

from jaxserve.client import EngineClient
from jaxserve.request import FinishReason, Request, TokenDelta, TokenLogprobs
from jaxserve.text.stop import StopStrings
from jaxserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How output becomes text.

    Attributes:
        stop: stop strings.
        keep_stop: show the stop string or token that ended the output (`no_stop_trim`).
        skip_special_tokens: leave control tokens out of the text.
    """

    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    skip_special_tokens: bool = True


class ChoiceToken(NamedTuple):
    """An output token with its log-probabilities and its offset in the choice's text, in characters."""

    token_id: int
    logprobs: TokenLogprobs
    text_offset: int


class ChoiceDelta(NamedTuple):
    """What a step adds to a choice. The last delta of a choice has a `finish_reason`.

    Attributes:
        choice: index of the choice.
        text: new text; may be empty.
        tokens: new tokens with log-probabilities, where they were asked for.
        finish_reason: None until the end.
        matched_stop: the token id or string that ended it.
        error: what went wrong, when `finish_reason` is `error`.
    """

    choice: int
    text: str = ""
    tokens: tuple[ChoiceToken, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: int | str | None = None
    error: str | None = None


class CollectedChoice(NamedTuple):
    """A finished choice: its text, its tokens where log-probabilities were asked for, and its last delta."""

    text: str
    tokens: list[ChoiceToken]
    end: ChoiceDelta


async def collect_choices(deltas: AsyncIterable[tuple[int, ChoiceDelta]], num_choices: int) -> list[CollectedChoice]:
    """Every choice, whole, by its number."""
    texts = [""] * num_choices
    tokens: list[list[ChoiceToken]] = [[] for _ in texts]
    ends: dict[int, ChoiceDelta] = {}
    async for index, delta in deltas:
        texts[index] += delta.text
        tokens[index].extend(delta.tokens)
        if delta.finish_reason is not None:
            ends[index] = delta
    return [CollectedChoice(text, tokens[index], ends[index]) for index, text in enumerate(texts)]


@dataclass
class Usage:
    """Token counts of a request so far.

    Attributes:
        prompt_tokens: counted once, whatever the number of choices.
        completion_tokens: over all choices, stop tokens included.
        cached_tokens: prompt tokens that came from the prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0


class _Choice:
    """Text of one choice."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions) -> None:
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=options.skip_special_tokens)
        self._stops = StopStrings(options.stop, keep=options.keep_stop)
        self._keep_stop = options.keep_stop
        self._length = 0
        self.num_tokens = 0
        self.finished = False

    def take(self, delta: TokenDelta) -> ChoiceDelta:
        """Turn a token delta into text; sets `finished`."""
        text, tokens, matched = "", [], None
        for index, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            if token_id == delta.matched_stop and index == len(delta.token_ids) - 1 and not self._keep_stop:
                break
            if delta.logprobs:
                tokens.append(ChoiceToken(token_id, delta.logprobs[index], self._length))
            piece = self._detokenizer.push(token_id)
            self._length += len(piece)
            shown, matched = self._stops.push(piece)
            text += shown
            if matched is not None:
                self.finished = True
                return ChoiceDelta(delta.choice, text, tuple(tokens), FinishReason.STOP, matched)
        if delta.finish_reason is not None:
            self.finished = True
            rest, matched = self._stops.push(self._detokenizer.flush())
            text += rest
            if matched is not None:
                return ChoiceDelta(delta.choice, text, tuple(tokens), FinishReason.STOP, matched)
            text += self._stops.flush()
        return ChoiceDelta(delta.choice, text, tuple(tokens), delta.finish_reason, delta.matched_stop, delta.error)


class Generation:
    """One running request: queued when this is built; iterate over `deltas`, and `close` in any case.

    Attributes:
        usage: kept up to date while iterating.
        prompt_logprobs: of prompt tokens [1, len), once the first delta has come, if they were asked for.

    Raises:
        OverloadedError, UnavailableError: as `EngineClient.submit` does.
    """

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, request: Request, options: TextOptions) -> None:
        self.request = request
        self._client = client
        self._choices = [_Choice(tokenizer, options) for _ in range(request.num_choices)]
        self._stream = client.submit(request)
        self.usage = Usage(prompt_tokens=len(request.prompt_token_ids))
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    async def deltas(self) -> AsyncGenerator[ChoiceDelta]:
        """Deltas of all choices as they come; ends when every choice has ended."""
        async for delta in self._stream:
            choice = self._choices[delta.choice]
            if choice.finished:
                continue
            self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
            if delta.choice == 0:  # the others take the prompt from this one
                self.usage.cached_tokens = delta.num_cached_tokens
            before = choice.num_tokens
            out = choice.take(delta)
            self.usage.completion_tokens += choice.num_tokens - before
            if choice.finished and delta.finish_reason is None:
                self._client.abort(self.request.id, delta.choice)
            yield out
            if all(choice.finished for choice in self._choices):
                return

    def interrupt(self, error: str) -> None:
        """End every open choice with an error, as seen by whoever iterates."""
        self._stream.fail(error)
        self._client.abort(self.request.id)

    def close(self) -> None:
        """Let go; what is not finished is aborted. Never waits."""
        self._stream.close()
