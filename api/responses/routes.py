"""`/v1/responses`: OpenAI's Responses protocol, translated to a chat and back."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from typing import Any

from litestar import Request as HttpRequest
from litestar import delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from api.blocks import Block, BlockEvent, BlockKind, BlockStream, Phase
from api.chat.run import CallIds, start_chat
from api.chat.schemas import CalledFunction, ChatMessage, ToolCall
from api.errors import stream_error
from api.openapi import StreamedOperation, errors
from api.requests.builder import RequestBuilder, answer_id
from api.requests.fields import check_fields
from api.requests.logprobs import chat_logprobs
from api.requests.running import RunningRequest, usage_info
from api.requests.schemas import ChatTokenLogprob
from api.responses.input import to_chat
from api.responses.schemas import (
    DeletedResponse,
    IncompleteDetails,
    InputTokensDetails,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputTokensDetails,
    ReasoningText,
    ResponseObject,
    ResponsesRequest,
    ResponsesUsage,
    TextFormat,
    TextOptions,
)
from api.responses.store import StoredResponse
from api.server import Server
from api.streaming import EventStream, named_event, unless_gone
from jaxserve.engine.output_processor import ChoiceDelta
from jaxserve.errors import RequestError
from jaxserve.request import FinishReason


@post(
    "/v1/responses",
    status_code=200,
    summary="Create a response",
    responses=errors(404, 429, body=True),
    operation_class=StreamedOperation,
)
async def create_response(
    data: JSONBody[ResponsesRequest],
    server: NamedDependency[Server],
    builder: NamedDependency[RequestBuilder],
    request: HttpRequest[Any, Any, Any],
) -> ResponseObject:
    """Generate a response; with `stream`, it is sent as server-sent events."""
    check_fields(await request.json(), ResponsesRequest, strict=server.settings.strict_params)
    chat = to_chat(data, _earlier_turns(server, data.previous_response_id))
    name = answer_id("resp_", None)
    running = await start_chat(server, builder, chat, "responses", name, len(await request.body()))
    # Instructions are not carried over to the next response.
    turns = chat.messages[data.instructions is not None :]
    answer = _Response(server, data, running, turns, size=len(await request.body()))
    if data.stream:
        return EventStream(answer.events(), answer.close, error=answer.error_event)  # type: ignore[return-value]
    return await unless_gone(request.receive, answer.collect(), answer.close)


@get("/v1/responses/{response_id:str}", summary="Retrieve a response", responses=errors(404))
async def retrieve_response(response_id: FromPath[str], server: NamedDependency[Server]) -> ResponseObject:
    """Return a stored response in its current state."""
    return server.responses.get(response_id).response


@post("/v1/responses/{response_id:str}/cancel", status_code=200, summary="Cancel a response", responses=errors(404))
async def cancel_response(response_id: FromPath[str], server: NamedDependency[Server]) -> ResponseObject:
    """Cancel a response that is in progress; a response that has ended is returned unchanged."""
    stored = server.responses.get(response_id)
    if stored.cancel is not None:
        stored.response.status = "cancelled"
        stored.cancel()
    return stored.response


@delete("/v1/responses/{response_id:str}", status_code=200, summary="Delete a response", responses=errors(404))
async def delete_response(response_id: FromPath[str], server: NamedDependency[Server]) -> DeletedResponse:
    """Delete a stored response."""
    server.responses.remove(response_id)
    return DeletedResponse(response_id)


def _earlier_turns(server: Server, response_id: str | None) -> Sequence[ChatMessage]:
    if response_id is None:
        return ()
    stored = server.responses.get(response_id, param="previous_response_id")
    if not stored.turns:
        raise RequestError(f"the response {response_id} is {stored.response.status}", param="previous_response_id")
    return stored.turns


class _Response:
    """Builds one response for the client, whole or as a stream, and for the store."""

    def __init__(
        self,
        server: Server,
        body: ResponsesRequest,
        running: RunningRequest,
        turns: list[ChatMessage],
        *,
        size: int,
    ) -> None:
        self._server = server
        self._running = running
        self._turns = turns
        self._ids = CallIds(server.model.formats.tool_calls.id_characters)
        self._blocks = BlockStream()
        self._items: list[OutputItem] = []
        self._logprobs: list[ChatTokenLogprob] = []
        self._new_logprobs: list[ChatTokenLogprob] = []
        self._sequence = 0
        self._response = ResponseObject(
            id=running.id,
            created_at=int(time.time()),
            model=running.model,
            status="in_progress",
            output=[],
            parallel_tool_calls=body.parallel_tool_calls is not False,
            tool_choice="auto" if body.tool_choice is None else body.tool_choice,
            tools=body.tools or [],
            text=TextOptions(TextFormat()) if body.text is None or body.text.format is None else body.text,
            temperature=body.temperature,
            top_p=body.top_p,
            truncation=body.truncation or "disabled",
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            previous_response_id=body.previous_response_id,
            reasoning=body.reasoning,
            store=body.store is not False,
            metadata=body.metadata or {},
            user=body.user,
        )
        if self._response.store:
            server.responses.add(StoredResponse(self._response, size, cancel=self._cancel))

    async def collect(self) -> ResponseObject:
        """Return the whole response."""
        async for _ in self.events():
            pass
        return self._response

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield `response.created`, `response.in_progress`, the events of each item, and the final event."""
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)
        end: ChoiceDelta | None = None
        async for _, delta in self._running.deltas():
            # Log-probabilities of this step's tokens; they are sent with the step's first text delta.
            self._new_logprobs = chat_logprobs(self._server.tokenizer, delta.tokens).content
            for event in self._blocks.add(delta.message_deltas):
                for data in self._block_event(event):
                    yield data
            if delta.finish_reason is not None:
                end = delta
        assert end is not None
        self._running.raise_errors((end,))
        for event in self._blocks.end():
            for data in self._block_event(event, cut_off=end.finish_reason is not FinishReason.STOP):
                yield data
        self._end(end)
        yield self._event(f"response.{self._response.status}", response=self._response)

    def close(self) -> None:
        """Release the request; a response that is still in progress is marked as cancelled."""
        self._running.close()
        if self._response.status == "in_progress":
            self._response.status = "cancelled"
        self._server.responses.end(self._response.id)

    def error_event(self, error: Exception) -> bytes:
        """Mark the response as failed and return its last event."""
        self._response.status = "failed"
        self._response.error = stream_error(error).error
        return self._event("response.failed", response=self._response)

    def _cancel(self) -> None:
        self._server.client.abort(self._running.generations[0].request.id)

    def _end(self, end: ChoiceDelta) -> None:
        usage = usage_info(self._running)
        response = self._response
        response.usage = ResponsesUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(usage.completion_tokens_details.reasoning_tokens),
            usage.total_tokens,
        )
        if not self._items:
            self._items.append(OutputMessage(_item_id("msg"), "completed", [OutputText("")]))
        # The text of a failed call is repeated in a message item, so the call itself is dropped.
        failed = {block.index for block in self._blocks.blocks if block.failed}
        response.output = [item for index, item in enumerate(self._items) if index not in failed]
        if end.finish_reason is FinishReason.STOP:
            response.status = "completed"
        elif end.finish_reason is FinishReason.ABORT:
            response.status = "cancelled"
        else:
            response.status = "incomplete"
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        if response.store:
            self._server.responses.end(response.id, [*self._turns, *_as_turns(response.output)])

    def _block_event(self, event: BlockEvent, *, cut_off: bool = False) -> Iterator[bytes]:
        phase, block, text = event
        if phase is Phase.START:
            self._items.append(_new_item(block, self._ids))
            yield self._event("response.output_item.added", output_index=block.index, item=self._items[-1])
            yield from self._part_event("added", block)
        elif phase is Phase.DELTA:
            location = self._event_location(block)
            if block.kind is BlockKind.TEXT:
                location["logprobs"], self._new_logprobs = self._new_logprobs, []
                self._logprobs += location["logprobs"]
            yield self._event(f"response.{_TEXTS[block.kind]}.delta", **location, delta=text)
        else:
            item = self._items[block.index]
            _fill(item, block, self._logprobs)
            self._logprobs = []
            item.status = "incomplete" if cut_off or block.failed else "completed"
            key = "arguments" if block.kind is BlockKind.CALL else "text"
            yield self._event(f"response.{_TEXTS[block.kind]}.done", **self._event_location(block), **{key: block.text})
            yield from self._part_event("done", block)
            yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _part_event(self, name: str, block: Block) -> Iterable[bytes]:
        """Yield a content part event if the block is a message; other items have none."""
        item = self._items[block.index]
        if isinstance(item, OutputMessage):
            location = {"item_id": item.id, "output_index": block.index, "content_index": 0}
            part = item.content[0] if item.content else OutputText("")
            yield self._event(f"response.content_part.{name}", **location, part=part)

    def _event_location(self, block: Block) -> dict[str, Any]:
        location: dict[str, Any] = {"item_id": self._items[block.index].id, "output_index": block.index}
        if block.kind is not BlockKind.CALL:
            location["content_index"] = 0
        if block.kind is BlockKind.TEXT:
            location["logprobs"] = self._logprobs
        return location

    def _event(self, kind: str, **fields: Any) -> bytes:
        sequence, self._sequence = self._sequence, self._sequence + 1
        return named_event(kind, {"type": kind, "sequence_number": sequence, **fields})


_TEXTS = {
    BlockKind.TEXT: "output_text",
    BlockKind.REASONING: "reasoning_text",
    BlockKind.CALL: "function_call_arguments",
}


def _item_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _new_item(block: Block, ids: CallIds) -> OutputItem:
    match block.kind:
        case BlockKind.TEXT:
            return OutputMessage(_item_id("msg"), "in_progress", [])
        case BlockKind.REASONING:
            return OutputReasoning(_item_id("rs"), "in_progress", [])
        case BlockKind.CALL:
            return OutputCall(_item_id("fc"), "in_progress", ids.of(block.call_id), block.name, "")


def _fill(item: OutputItem, block: Block, logprobs: list[Any]) -> None:
    match item:
        case OutputMessage():
            item.content = [OutputText(block.text, logprobs=logprobs)]
        case OutputReasoning():
            item.content = [ReasoningText(block.text)]
        case OutputCall():
            item.arguments = block.text


def _as_turns(items: Iterable[OutputItem]) -> list[ChatMessage]:
    """Convert the model's output to a turn of the next request's history."""
    turn = ChatMessage("assistant", "")
    for item in items:
        match item:
            case OutputMessage():
                turn.content = f"{turn.content}{item.content[0].text}"
            case OutputReasoning():
                turn.reasoning_content = (turn.reasoning_content or "") + item.content[0].text
            case OutputCall() if item.status == "completed":
                call = ToolCall(item.call_id, CalledFunction(item.name, item.arguments))
                turn.tool_calls = [*(turn.tool_calls or ()), call]
            case OutputCall():
                pass
    return [turn]
