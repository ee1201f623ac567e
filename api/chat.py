"""`POST /v1/chat/completions`."""

import time
from collections.abc import AsyncGenerator
from typing import Any

from litestar import Request as HttpRequest
from litestar import post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from api.logprobs import chat_logprobs
from api.openapi import StreamedOperation, errors
from api.params import RequestBuilder, answer_id, build, check_fields
from api.running import RunningRequest, usage_info
from api.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
)
from api.server import Server
from api.streaming import DONE, EventStream, event, unless_gone
from jaxserve.generation import ChoiceDelta


@post(
    "/v1/chat/completions",
    status_code=200,
    summary="Chat completion",
    responses=errors(404, 429, body=True),
    operation_class=StreamedOperation,
)
async def chat_completions(
    data: JSONBody[ChatCompletionRequest],
    server: NamedDependency[Server],
    builder: NamedDependency[RequestBuilder],
    request: HttpRequest[Any, Any, Any],
) -> ChatCompletion:
    """Continue a conversation; with `stream` the answer is server-sent events."""
    check_fields(await request.json(), ChatCompletionRequest)
    model = server.check_model(data.model)
    name = answer_id("chatcmpl", data.rid)
    prepared = await build(len(await request.body()), builder.chat, data)
    running = RunningRequest(server, "chat", name, [prepared])
    chat = _Chat(server, data, model, running)
    if data.stream:
        return EventStream(chat.events(), running.close)  # type: ignore[return-value]
    return await unless_gone(request.receive, chat.collect(), running.close)


class _Chat:
    """One chat request on its way to the client."""

    def __init__(self, server: Server, body: ChatCompletionRequest, model: str, running: RunningRequest) -> None:
        self._server = server
        self._body = body
        self._model = model
        self._running = running
        self._created = int(time.time())
        self._id = running.id

    async def collect(self) -> ChatCompletion:
        """The whole answer."""
        outputs = await self._running.collect()
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=output.text),
                finish_reason=str(output.end.finish_reason),
                logprobs=chat_logprobs(self._server.tokenizer, output.tokens) if self._body.logprobs else None,
                matched_stop=output.end.matched_stop,
            )
            for index, output in enumerate(outputs)
        ]
        return ChatCompletion(self._id, self._created, self._model, choices, usage_info(self._running))

    async def events(self) -> AsyncGenerator[bytes]:
        """Role chunks, content, one finish chunk per choice, usage, `[DONE]`."""
        options = self._body.stream_options
        continuous = options is not None and options.continuous_usage_stats
        for index in range(self._running.num_choices):
            yield self._chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content="")), usage=continuous)
        ends: dict[int, ChoiceDelta] = {}
        async for index, delta in self._running.deltas():
            if delta.text or delta.tokens:
                logprobs = chat_logprobs(self._server.tokenizer, delta.tokens) if self._body.logprobs else None
                choice = ChatChunkChoice(index, ChatDelta(content=delta.text), logprobs=logprobs)
                yield self._chunk(choice, usage=continuous)
            if delta.finish_reason is not None:
                ends[index] = delta
        self._running.raise_errors(ends.values())
        for index, end in sorted(ends.items()):
            choice = ChatChunkChoice(index, ChatDelta(), str(end.finish_reason), matched_stop=end.matched_stop)
            yield self._chunk(choice, usage=continuous)
        if options is not None and options.include_usage:
            yield event(ChatCompletionChunk(self._id, self._created, self._model, [], usage_info(self._running)))
        yield DONE

    def _chunk(self, choice: ChatChunkChoice, *, usage: bool) -> bytes:
        chunk = ChatCompletionChunk(self._id, self._created, self._model, [choice])
        if usage:
            chunk.usage = usage_info(self._running)
        return event(chunk)
