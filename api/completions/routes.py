"""`POST /v1/completions`."""

import time
from collections.abc import AsyncGenerator
from itertools import zip_longest
from typing import Any

from litestar import Request as HttpRequest
from litestar import post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from api.completions.build import build_completions
from api.completions.schemas import Completion, CompletionChoice, CompletionRequest
from api.openapi import StreamedOperation, errors
from api.requests.builder import RequestBuilder, answer_id, build
from api.requests.fields import check_fields
from api.requests.logprobs import completion_logprobs
from api.requests.running import RunningRequest, usage_info
from api.requests.schemas import CompletionLogprobs
from api.server import Server
from api.streaming import DONE, EventStream, event, unless_gone
from jaxserve.engine.output_processor import ChoiceToken
from jaxserve.request import TokenLogprobs


@post(
    "/v1/completions",
    status_code=200,
    summary="Text completion",
    responses=errors(404, 429, body=True),
    operation_class=StreamedOperation,
)
async def completions(
    data: JSONBody[CompletionRequest],
    server: NamedDependency[Server],
    builder: NamedDependency[RequestBuilder],
    request: HttpRequest[Any, Any, Any],
) -> Completion:
    """Complete one or several prompts; with `stream`, the response is server-sent events."""
    check_fields(await request.json(), CompletionRequest, strict=server.settings.strict_params)
    name = answer_id("cmpl-", data.rid)
    prepared = await build(len(await request.body()), build_completions, builder, data)
    await server.check_grammar(prepared[0])
    running = RunningRequest(server, "completions", name, prepared)
    answer = _Completion(server, data, running)
    if data.stream:
        return EventStream(answer.events(), running.close)  # type: ignore[return-value]
    return await unless_gone(request.receive, answer.collect(), running.close)


class _Echo:
    """The prompt as returned with `echo`."""

    def __init__(self, server: Server, prompt_token_ids: tuple[int, ...], given: str | None) -> None:
        self._tokenizer = server.tokenizer
        self._ids = prompt_token_ids
        self.text = self._tokenizer.decode(prompt_token_ids) if given is None else given

    def tokens(self, logprobs: tuple[TokenLogprobs, ...]) -> list[tuple[int, TokenLogprobs | None, int]]:
        """Return the prompt tokens with log-probabilities (None for the first token) and text offsets."""
        detokenizer = self._tokenizer.detokenizer(skip_special_tokens=False)
        offset = 0
        first = self._tokenizer.token_text(self._ids[0]).text
        added = self._ids[0] in self._tokenizer.special_ids and not self.text.startswith(first)
        out: list[tuple[int, TokenLogprobs | None, int]] = []
        for token_id, logprob in zip_longest(self._ids, (None, *logprobs)):
            out.append((token_id, logprob, min(offset, len(self.text))))
            piece = detokenizer.push(token_id)
            # A BOS token that the tokenizer added is not part of the text.
            offset += 0 if added and len(out) == 1 else len(piece)
        return out


class _Completion:
    """Builds the response to one completions request, whole or as a stream."""

    def __init__(self, server: Server, body: CompletionRequest, running: RunningRequest) -> None:
        self._server = server
        self._body = body
        self._model = running.model
        self._running = running
        self._created = int(time.time())
        self._id = running.id
        texts: list[Any] = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        self._echoes = (
            [
                _Echo(server, generation.request.prompt_token_ids, texts[i] if isinstance(texts[i], str) else None)
                for i, generation in enumerate(running.generations)
            ]
            if body.echo
            else []
        )

    async def collect(self) -> Completion:
        """Return the whole response."""
        outputs = await self._running.collect()
        choices = [
            CompletionChoice(
                index=position,
                text=self._echo_text(source) + outputs[source].text,
                finish_reason=str(outputs[source].end.finish_reason),
                logprobs=self._logprobs(source, outputs[source].tokens, first=True),
                matched_stop=outputs[source].end.matched_stop,
            )
            for position, source in enumerate(self._best([output.tokens for output in outputs]))
        ]
        return Completion(self._id, self._created, self._model, choices, usage_info(self._running))

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield text chunks (the last of each choice has the finish reason), usage and `[DONE]`."""
        options = self._body.stream_options
        continuous = options is not None and options.continuous_usage_stats
        started: set[int] = set()
        async for index, delta in self._running.deltas():
            self._running.raise_errors((delta,))
            first = index not in started
            if not (delta.text or delta.tokens or delta.finish_reason is not None):
                continue
            started.add(index)
            choice = CompletionChoice(
                index=index,
                text=(self._echo_text(index) if first else "") + delta.text,
                finish_reason=None if delta.finish_reason is None else str(delta.finish_reason),
                logprobs=self._logprobs(index, list(delta.tokens), first=first),
                matched_stop=delta.matched_stop,
            )
            chunk = Completion(self._id, self._created, self._model, [choice])
            if continuous:
                chunk.usage = usage_info(self._running)
            yield event(chunk)
        if options is not None and options.include_usage:
            yield event(Completion(self._id, self._created, self._model, [], usage_info(self._running)))
        yield DONE

    def _echo_text(self, index: int) -> str:
        return self._echoes[index // self._running.choices_per_prompt].text if self._echoes else ""

    def _best(self, tokens: list[list[ChoiceToken]]) -> list[int]:
        """Return the choices to keep: all, or with `best_of` the `n` per prompt with the best mean log-probability."""
        wanted, per_prompt = self._body.n or 1, self._running.choices_per_prompt

        def mean_logprob(index: int) -> float:
            values = [token.logprobs.logprob for token in tokens[index]]
            return sum(values) / len(values) if values else float("-inf")

        best: list[int] = []
        for start in range(0, len(tokens), per_prompt):
            indices = range(start, start + per_prompt)
            best += sorted(indices, key=mean_logprob, reverse=True)[:wanted] if wanted < per_prompt else indices
        return best

    def _logprobs(self, index: int, tokens: list[ChoiceToken], *, first: bool) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        shown: list[tuple[int, TokenLogprobs | None, int]] = []
        prompt = index // self._running.choices_per_prompt
        if self._echoes and first:
            shown += self._echoes[prompt].tokens(self._running.generations[prompt].prompt_logprobs)
        start = len(self._echo_text(index))
        shown += [(token.token_id, token.logprobs, start + token.text_offset) for token in tokens]
        return completion_logprobs(self._server.tokenizer, shown, self._body.logprobs)
