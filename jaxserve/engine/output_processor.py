"""Turns the token deltas of a request into the text and message deltas that clients see.

Used by the HTTP API and by the offline `LLM`.
"""

from collections.abc import AsyncGenerator, AsyncIterable
from dataclasses import dataclass
from typing import NamedTuple

from jaxserve.engine.client import EngineClient
from jaxserve.parsing.deltas import MessageDelta
from jaxserve.parsing.message_parser import MessageParserConfig
from jaxserve.request import FinishReason, Request, TokenDelta, TokenLogprobs
from jaxserve.text.stop import StopStrings
from jaxserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options for converting output tokens to text.

    Attributes:
        stop: stop strings.
        keep_stop: show the stop string or token that ended the output (`no_stop_trim`).
        skip_special_tokens: leave control tokens out of the text.
        kept_ids: control tokens that stay in the text despite `skip_special_tokens`.
        message: parser settings for reading the text as a message; None for plain text.
    """

    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    skip_special_tokens: bool = True
    kept_ids: frozenset[int] = frozenset()
    message: MessageParserConfig | None = None


class ChoiceToken(NamedTuple):
    """An output token with its log-probabilities and its offset in the choice's text, in characters."""

    token_id: int
    logprobs: TokenLogprobs
    text_offset: int


class ChoiceDelta(NamedTuple):
    """New output of a choice from one step. The last delta of a choice has a `finish_reason`.

    Attributes:
        choice: index of the choice.
        text: new text; may be empty.
        message_deltas: parts of the message that the new text completes; empty without a message parser.
        tokens: new tokens with log-probabilities, if requested.
        token_ids: new tokens, without a hidden stop token and tokens after the end.
        finish_reason: None until the end.
        matched_stop: the token id or string that ended the choice.
        error: error message if `finish_reason` is `error`.
        refused: the error is the request's fault.
    """

    choice: int
    text: str = ""
    message_deltas: tuple[MessageDelta, ...] = ()
    tokens: tuple[ChoiceToken, ...] = ()
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: int | str | None = None
    error: str | None = None
    refused: bool = False


class CollectedChoice(NamedTuple):
    """A finished choice: its concatenated deltas, and the last delta as `end`."""

    text: str
    message_deltas: list[MessageDelta]
    tokens: list[ChoiceToken]
    token_ids: list[int]
    end: ChoiceDelta


async def collect_choices(deltas: AsyncIterable[tuple[int, ChoiceDelta]], num_choices: int) -> list[CollectedChoice]:
    """Collect the deltas of every choice; return the finished choices in order."""
    parts: list[list[ChoiceDelta]] = [[] for _ in range(num_choices)]
    async for index, delta in deltas:
        parts[index].append(delta)
    return [
        CollectedChoice(
            text="".join(delta.text for delta in choice),
            message_deltas=[part for delta in choice for part in delta.message_deltas],
            tokens=[token for delta in choice for token in delta.tokens],
            token_ids=[token_id for delta in choice for token_id in delta.token_ids],
            end=choice[-1],
        )
        for choice in parts
    ]


@dataclass
class Usage:
    """Token counts of a request so far.

    Attributes:
        prompt_tokens: counted once, whatever the number of choices.
        completion_tokens: output tokens of all choices, stop tokens included.
        reasoning_tokens: output tokens of thinking, including its tags.
        cached_tokens: prompt tokens that came from the prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0


class _Shown:
    """Collects the visible output of one delta."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.message_deltas: list[MessageDelta] = []
        self.tokens: list[ChoiceToken] = []
        self.token_ids: list[int] = []

    def delta(self, choice: int) -> ChoiceDelta:
        """Return the collected output as a delta of `choice`."""
        return ChoiceDelta(
            choice, "".join(self.text), tuple(self.message_deltas), tuple(self.tokens), tuple(self.token_ids)
        )  # fmt: skip


class _Choice:
    """Converts the tokens of one choice to text."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions) -> None:
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=options.skip_special_tokens, kept_ids=options.kept_ids
        )
        self._stops = StopStrings(options.stop, keep=options.keep_stop)
        self._parser = None if options.message is None else options.message.parser()
        self._keep_stop = options.keep_stop
        self._length = 0
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.finished = False

    def take(self, delta: TokenDelta) -> ChoiceDelta:
        """Convert a token delta to text; sets `finished` if the choice ends."""
        shown = _Shown()
        reason, matched = delta.finish_reason, delta.matched_stop
        for index, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            if token_id == delta.matched_stop and index == len(delta.token_ids) - 1 and not self._keep_stop:
                self.num_reasoning_tokens += self._parser is not None and self._parser.thinking
                break
            shown.token_ids.append(token_id)
            if delta.logprobs:
                shown.tokens.append(ChoiceToken(token_id, delta.logprobs[index], self._length))
            stop = self._show(self._detokenizer.push(token_id), shown)
            if self.finished:
                return self._end(delta, shown, FinishReason.STOP, stop)
        if reason is not None:
            stop = self._show(self._detokenizer.flush(), shown)
            if stop is not None:
                reason, matched = FinishReason.STOP, stop
            return self._end(delta, shown, reason, matched)
        return shown.delta(delta.choice)

    def _show(self, new: str, into: _Shown) -> str | None:
        """Append the text `new` of one token; set `finished` if it ends the output. Return the matched stop string."""
        self._length += len(new)
        text, stop = self._stops.push(new)
        into.text.append(text)
        if self._parser is not None:
            before = self._parser.thinking
            into.message_deltas += self._parser.push(text)
            self.num_reasoning_tokens += before or self._parser.thinking
            self.finished = self._parser.finished
        self.finished = self.finished or stop is not None
        return stop

    def _end(self, delta: TokenDelta, shown: _Shown, reason: FinishReason, matched: int | str | None) -> ChoiceDelta:
        """Return the last delta, including the output that was held back."""
        self.finished = True
        if not isinstance(matched, str):
            rest = self._stops.flush()
            shown.text.append(rest)
            shown.message_deltas += self._parser.push(rest) if self._parser is not None else ()
        if self._parser is not None:
            shown.message_deltas += self._parser.finish(cut_off=reason is not FinishReason.STOP)
        return shown.delta(delta.choice)._replace(
            finish_reason=reason,
            matched_stop=matched,
            error=delta.error,
            refused=delta.refused,
        )


class GenerationStream:
    """One running request, submitted on construction. Callers iterate over `deltas` and must always call `close`.

    Attributes:
        usage: token counts, updated while iterating.
        prompt_logprobs: log-probabilities of prompt tokens [1, len) from the first delta on, if the request wants them.

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
        """Yield the deltas of all choices as they arrive, until every choice has ended."""
        async for delta in self._stream:
            choice = self._choices[delta.choice]
            if choice.finished:
                continue
            self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
            if delta.choice == 0:  # the other choices reuse its prompt
                self.usage.cached_tokens = delta.num_cached_tokens
            before, reasoning_before = choice.num_tokens, choice.num_reasoning_tokens
            out = choice.take(delta)
            self.usage.completion_tokens += choice.num_tokens - before
            self.usage.reasoning_tokens += choice.num_reasoning_tokens - reasoning_before
            if choice.finished and delta.finish_reason is None:
                self._client.abort(self.request.id, delta.choice)
            yield out
            if all(choice.finished for choice in self._choices):
                return

    def interrupt(self, error: str) -> None:
        """Abort the request and end every open choice with an error, which `deltas` yields."""
        self._stream.fail(error)
        self._client.abort(self.request.id)

    def close(self) -> None:
        """Release the request and abort it if it has not ended. Never waits."""
        self._stream.close()
