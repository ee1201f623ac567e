"""`POST /v1/chat/completions`."""

import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from litestar import Request as HttpRequest
from litestar import post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from api.chat.run import CallIds, finish_reason, start_chat
from api.chat.schemas import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from api.openapi import StreamedOperation, errors
from api.requests.builder import RequestBuilder, answer_id
from api.requests.fields import check_fields
from api.requests.logprobs import chat_logprobs
from api.requests.running import RunningRequest, usage_info
from api.server import Server
from api.streaming import DONE, EventStream, event, unless_gone
from jaxserve.engine.output_processor import ChoiceDelta, CollectedChoice
from jaxserve.parsing.deltas import CallArguments, CallEnd, CallFailed, CallStart, Content, MessageDelta, Reasoning
from jaxserve.parsing.message import Message


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
    """Generate a chat completion; with `stream`, the response is server-sent events."""
    check_fields(await request.json(), ChatCompletionRequest, strict=server.settings.strict_params)
    name = answer_id("chatcmpl-", data.rid)
    running = await start_chat(server, builder, data, "chat", name, len(await request.body()))
    chat = _Chat(server, data, running)
    if data.stream:
        return EventStream(chat.events(), running.close)  # type: ignore[return-value]
    return await unless_gone(request.receive, chat.collect(), running.close)


class _Chat:
    """Builds the response to one chat request, whole or as a stream."""

    def __init__(self, server: Server, body: ChatCompletionRequest, running: RunningRequest) -> None:
        self._server = server
        self._body = body
        self._model = running.model
        self._running = running
        self._created = int(time.time())
        self._id = running.id
        self._ids = CallIds(server.model.formats.tool_calls.id_characters)

    async def collect(self) -> ChatCompletion:
        """Return the whole response."""
        outputs = await self._running.collect()
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return ChatCompletion(self._id, self._created, self._model, choices, usage_info(self._running))

    def _choice(self, index: int, output: CollectedChoice) -> ChatChoice:
        message = Message().add(output.message_deltas)
        calls = [
            ToolCall(self._ids.of(call.id), CalledFunction(call.name, call.arguments), index=number)
            for number, call in enumerate(message.calls.values())
        ]
        assert output.end.finish_reason is not None
        called = any(call.complete for call in message.calls.values())
        return ChatChoice(
            index=index,
            message=AssistantMessage(
                content=None if calls and not message.content else message.content,
                reasoning_content=message.reasoning or None,
                tool_calls=calls or None,
            ),
            finish_reason=finish_reason(output.end.finish_reason, called=called),
            logprobs=chat_logprobs(self._server.tokenizer, output.tokens) if self._body.logprobs else None,
            matched_stop=output.end.matched_stop,
        )

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield role chunks, message deltas, one finish chunk per choice, usage and `[DONE]`."""
        options = self._body.stream_options
        continuous = options is not None and options.continuous_usage_stats
        for index in range(self._running.num_choices):
            yield self._chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content="")), usage=continuous)
        ends: dict[int, ChoiceDelta] = {}
        called: set[int] = set()
        async for index, delta in self._running.deltas():
            if any(isinstance(part, CallEnd) for part in delta.message_deltas):
                called.add(index)
            for choice in self._choices(index, delta):
                yield self._chunk(choice, usage=continuous)
            if delta.finish_reason is not None:
                ends[index] = delta
        self._running.raise_errors(ends.values())
        for index, end in sorted(ends.items()):
            assert end.finish_reason is not None
            reason = finish_reason(end.finish_reason, called=index in called)
            choice = ChatChunkChoice(index, ChatDelta(), reason, matched_stop=end.matched_stop)
            yield self._chunk(choice, usage=continuous)
        if options is not None and options.include_usage:
            yield event(ChatCompletionChunk(self._id, self._created, self._model, [], usage_info(self._running)))
        yield DONE

    def _choices(self, index: int, delta: ChoiceDelta) -> Iterable[ChatChunkChoice]:
        """Yield a chunk for each message delta; the first one carries the log-probabilities."""
        deltas = [wire for part in delta.message_deltas if (wire := self._delta(part)) is not None]
        if delta.tokens and not deltas:
            deltas = [ChatDelta(content="")]
        logprobs = chat_logprobs(self._server.tokenizer, delta.tokens) if self._body.logprobs and deltas else None
        for wire in deltas:
            yield ChatChunkChoice(index, wire, logprobs=logprobs)
            logprobs = None

    def _delta(self, part: MessageDelta) -> ChatDelta | None:
        match part:
            case Content(text=text) | CallFailed(text=text):
                return ChatDelta(content=text)
            case Reasoning(text=text):
                return ChatDelta(reasoning_content=text)
            case CallStart(call=index, name=name, id=own):
                function = FunctionDelta(name=name, arguments="")
                return ChatDelta(tool_calls=[ToolCallDelta(index, self._ids.of(own), "function", function)])
            case CallArguments(call=index, text=text):
                return ChatDelta(tool_calls=[ToolCallDelta(index, function=FunctionDelta(arguments=text))])
            case CallEnd():
                return None

    def _chunk(self, choice: ChatChunkChoice, *, usage: bool) -> bytes:
        chunk = ChatCompletionChunk(self._id, self._created, self._model, [choice])
        if usage:
            chunk.usage = usage_info(self._running)
        return event(chunk)
