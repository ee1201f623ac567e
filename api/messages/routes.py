"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's protocol, translated to a chat and back."""

import json
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from litestar import Request as HttpRequest
from litestar import post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from api.blocks import Block, BlockEvent, BlockKind, BlockStream, Phase
from api.chat.build import count_prompt_tokens
from api.chat.run import CallIds, start_chat
from api.chat.schemas import (
    CalledFunction,
    ChatCompletionRequest,
    ChatMessage,
    FunctionDefinition,
    FunctionName,
    NamedToolChoice,
    ToolCall,
    ToolChoice,
    ToolDefinition,
)
from api.errors import stream_error
from api.messages.schemas import (
    CountTokensRequest,
    CountTokensResponse,
    InputMessage,
    MessagesRequest,
    MessagesResponse,
    MessagesTool,
    MessagesUsage,
    RedactedThinkingBlock,
    TextBlock,
    TextBlockIn,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from api.openapi import StreamedOperation, errors
from api.requests.builder import RequestBuilder, answer_id, build
from api.requests.fields import check_fields
from api.requests.running import RunningRequest, usage_info
from api.server import Server
from api.streaming import EventStream, named_event, unless_gone
from jaxserve.engine.output_processor import ChoiceDelta
from jaxserve.errors import RequestError
from jaxserve.request import FinishReason


@post(
    "/v1/messages",
    status_code=200,
    summary="Anthropic message",
    responses=errors(404, 429, body=True),
    operation_class=StreamedOperation,
)
async def messages(
    data: JSONBody[MessagesRequest],
    server: NamedDependency[Server],
    builder: NamedDependency[RequestBuilder],
    request: HttpRequest[Any, Any, Any],
) -> MessagesResponse:
    """Generate the next message; with `stream`, the response is server-sent events."""
    check_fields(await request.json(), MessagesRequest, strict=server.settings.strict_params)
    body = to_chat(data)
    if body.thinking_budget is not None and server.model.formats.reasoning is None:
        raise RequestError("thinking needs a server with --reasoning-parser", param="thinking")
    body.max_tokens = data.max_tokens
    body.temperature, body.top_p, body.top_k = data.temperature, data.top_p, data.top_k
    body.stop = data.stop_sequences
    running = await start_chat(server, builder, body, "messages", answer_id("msg_", None), len(await request.body()))
    answer = _Message(server, running)
    if data.stream:
        return EventStream(answer.events(), running.close, error=_error_event)  # type: ignore[return-value]
    return await unless_gone(request.receive, answer.collect(), running.close)


@post(
    "/v1/messages/count_tokens",
    status_code=200,
    summary="Tokens of an Anthropic message",
    responses=errors(404, body=True),
)
async def count_tokens(
    data: JSONBody[CountTokensRequest],
    server: NamedDependency[Server],
    builder: NamedDependency[RequestBuilder],
    request: HttpRequest[Any, Any, Any],
) -> CountTokensResponse:
    """Count the prompt tokens of a conversation."""
    check_fields(await request.json(), CountTokensRequest, strict=server.settings.strict_params)
    server.model.names.resolve(data.model)
    size = len(await request.body())
    return CountTokensResponse(await build(size, count_prompt_tokens, builder, to_chat(data)))


def to_chat(body: CountTokensRequest) -> ChatCompletionRequest:
    """Translate the conversation to a chat request.

    Raises:
        RequestError: a field is not valid in Anthropic's protocol.
    """
    turns: list[ChatMessage] = []
    if body.system:
        turns.append(ChatMessage("system", _joined(body.system)))
    for index, message in enumerate(body.messages):
        turns += _turns(message, f"messages.{index}")
    chat = ChatCompletionRequest(messages=turns)
    if body.tools:
        chat.tools = [_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        chat.tool_choice = _tool_choice(body)
        if body.tool_choice.disable_parallel_tool_use:
            chat.parallel_tool_calls = False
    if body.thinking is not None:
        enabled = body.thinking.type != "disabled"
        chat.chat_template_kwargs = {"thinking": enabled, "enable_thinking": enabled}
        chat.thinking_budget = body.thinking.budget_tokens if enabled else None
    return chat


def _turns(message: InputMessage, where: str) -> Iterator[ChatMessage]:
    """Yield the chat messages of one turn: one for each tool result and one for the other blocks."""
    if isinstance(message.content, str):
        yield ChatMessage(message.role, message.content)
        return
    texts: list[str] = []
    thinking: list[str] = []
    calls: list[ToolCall] = []
    for block in message.content:
        match block:
            case TextBlockIn():
                texts.append(block.text)
            case ThinkingBlock():
                thinking.append(block.thinking)
            case RedactedThinkingBlock():
                pass
            case ToolUseBlock():
                arguments = msgspec.json.encode(block.input).decode()
                calls.append(ToolCall(block.id, CalledFunction(block.name, arguments)))
            case ToolResultBlock():
                if message.role != "user":
                    raise RequestError(f"{where}: tool_result belongs to user messages", param="messages")
                yield ChatMessage("tool", _joined(block.content or ""), tool_call_id=block.tool_use_id)
    if texts or thinking or calls:
        yield ChatMessage(
            message.role,
            "".join(texts),
            reasoning_content="".join(thinking) or None,
            tool_calls=calls or None,
        )


def _joined(content: str | Sequence[TextBlockIn]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _tool(tool: MessagesTool) -> ToolDefinition:
    return ToolDefinition(FunctionDefinition(tool.name, tool.description, tool.input_schema, tool.strict))


def _tool_choice(body: CountTokensRequest) -> ToolChoice:
    choice = body.tool_choice
    assert choice is not None
    match choice.type:
        case "any":
            return "required"
        case "tool":
            if choice.name is None:
                raise RequestError("tool_choice of type tool needs a name", param="tool_choice")
            return NamedToolChoice(FunctionName(choice.name))
        case other:
            return other


def _error_event(error: Exception) -> bytes:
    return named_event("error", {"type": "error", "error": stream_error(error).error})


class _Message:
    """Builds the response to one messages request, whole or as a stream."""

    def __init__(self, server: Server, running: RunningRequest) -> None:
        self._running = running
        self._ids = CallIds(server.model.formats.tool_calls.id_characters)
        self._blocks = BlockStream()

    async def collect(self) -> MessagesResponse:
        """Return the whole response."""
        [output] = await self._running.collect()
        for _ in self._blocks.add(output.message_deltas):
            pass
        return self._response(
            [_wire_block(block, self._ids.of(block.call_id)) for block in self._blocks.blocks if not block.failed],
            output.end,
        )

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield `message_start`, each block's start, deltas and stop, `message_delta` and `message_stop`."""
        yield named_event("message_start", {"type": "message_start", "message": self._response([], None)})
        end: ChoiceDelta | None = None
        async for _, delta in self._running.deltas():
            for data in self._block_events(self._blocks.add(delta.message_deltas)):
                yield data
            if delta.finish_reason is not None:
                end = delta
        assert end is not None
        self._running.raise_errors((end,))
        for data in self._block_events(self._blocks.end()):
            yield data
        last = self._response([], end)
        change = {"stop_reason": last.stop_reason, "stop_sequence": last.stop_sequence}
        yield named_event("message_delta", {"type": "message_delta", "delta": change, "usage": last.usage})
        yield named_event("message_stop", {"type": "message_stop"})

    def _block_events(self, events: Iterable[BlockEvent]) -> Iterator[bytes]:
        for phase, block, text in events:
            name = {Phase.START: "start", Phase.DELTA: "delta", Phase.STOP: "stop"}[phase]
            payload: dict[str, Any] = {"type": f"content_block_{name}", "index": block.index}
            if phase is Phase.START:
                payload["content_block"] = _wire_block(block, self._ids.of(block.call_id))
            elif phase is Phase.DELTA:
                kind, key = _DELTAS[block.kind]
                payload["delta"] = {"type": kind, key: text}
            yield named_event(payload["type"], payload)

    def _response(
        self, content: list[ThinkingBlock | TextBlock | ToolUseBlock], end: ChoiceDelta | None
    ) -> MessagesResponse:
        usage = usage_info(self._running)
        cached = usage.prompt_tokens_details.cached_tokens
        stopped = end is not None and isinstance(end.matched_stop, str)
        return MessagesResponse(
            id=self._running.id,
            model=self._running.model,
            content=content,
            usage=MessagesUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached),
            stop_reason=None if end is None else self._stop_reason(end),
            stop_sequence=str(end.matched_stop) if end is not None and stopped else None,
        )

    def _stop_reason(self, end: ChoiceDelta) -> str:
        if end.finish_reason is FinishReason.LENGTH:
            return "max_tokens"
        if any(block.kind is BlockKind.CALL and not block.failed for block in self._blocks.blocks):
            return "tool_use"
        return "stop_sequence" if isinstance(end.matched_stop, str) else "end_turn"


_DELTAS = {
    BlockKind.TEXT: ("text_delta", "text"),
    BlockKind.REASONING: ("thinking_delta", "thinking"),
    BlockKind.CALL: ("input_json_delta", "partial_json"),
}


def _wire_block(block: Block, call_id: str) -> ThinkingBlock | TextBlock | ToolUseBlock:
    """Return a block with its content so far; a call's arguments are empty until they are complete."""
    match block.kind:
        case BlockKind.REASONING:
            return ThinkingBlock(block.text)
        case BlockKind.TEXT:
            return TextBlock(block.text)
        case BlockKind.CALL:
            try:
                # json.loads also accepts lone surrogates, which msgspec does not; they become question marks.
                whole = json.dumps(json.loads(block.text or "{}"), ensure_ascii=False)
                arguments: Any = json.loads(whole.encode("utf-8", "replace"))
            except ValueError:  # cut off at max_tokens
                arguments = {}
            return ToolUseBlock(call_id, block.name, arguments)
