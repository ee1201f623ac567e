"""Translates the body of `/v1/responses` to a chat request."""

from collections.abc import Sequence

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
from api.requests.schemas import JsonSchemaFormat, ResponseFormat
from api.responses.schemas import InputItem, InputPart, ResponsesRequest, ResponsesTool, ResponsesToolChoice
from jaxserve.errors import RequestError

_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def to_chat(body: ResponsesRequest, earlier: Sequence[ChatMessage]) -> ChatCompletionRequest:
    """Translate a Responses request to a chat request.

    Args:
        body: the Responses request.
        earlier: turns of the previous response's conversation.

    Raises:
        RequestError: the request contains something that is not supported.
    """
    if body.truncation == "auto":
        raise RequestError(
            "truncation 'auto' is not supported: an input that is too long is refused", param="truncation"
        )
    system = [] if body.instructions is None else [ChatMessage("system", body.instructions)]
    chat = ChatCompletionRequest(messages=[*system, *earlier, *read_input(body.input)])
    chat.max_tokens = body.max_output_tokens
    chat.temperature, chat.top_p = body.temperature, body.top_p
    if body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ()):
        chat.logprobs, chat.top_logprobs = True, body.top_logprobs or 0
    if body.tools:
        chat.tools = [_tool(tool, index) for index, tool in enumerate(body.tools)]
        chat.parallel_tool_calls = body.parallel_tool_calls
    if body.tool_choice is not None:
        chat.tool_choice = _tool_choice(body.tool_choice)
    if body.reasoning is not None:
        chat.reasoning_effort = body.reasoning.effort
    if body.text is not None and body.text.format is not None:
        format = body.text.format
        schema = None
        if format.type == "json_schema":
            schema = JsonSchemaFormat(format.schema, format.name, format.description, format.strict)
        chat.response_format = ResponseFormat(format.type, schema)
    return chat


def read_input(given: str | Sequence[InputItem]) -> list[ChatMessage]:
    """Return the turns of an input; consecutive reasoning, messages and calls of the assistant form one turn.

    Raises:
        RequestError: an item is of an unsupported type, or lacks a field.
    """
    if isinstance(given, str):
        return [ChatMessage("user", given)]
    turns: list[ChatMessage] = []
    for index, item in enumerate(given):
        where = f"input.{index}"
        match item.type:
            case "message":
                if item.role is None or item.content is None:
                    raise RequestError(f"{where}: a message needs role and content", param="input")
                if item.role == "assistant":
                    turn = _assistant_turn(turns)
                    turn.content = f"{turn.content or ''}{_text(item.content, where)}"
                else:
                    turns.append(ChatMessage(item.role, _text(item.content, where)))
            case "reasoning":
                turn = _assistant_turn(turns)
                turn.reasoning_content = (turn.reasoning_content or "") + _text(item.content or [], where)
            case "function_call":
                if item.call_id is None or item.name is None:
                    raise RequestError(f"{where}: a function_call needs call_id and name", param="input")
                turn = _assistant_turn(turns)
                call = ToolCall(item.call_id, CalledFunction(item.name, item.arguments or "{}"))
                turn.tool_calls = [*(turn.tool_calls or ()), call]
            case "function_call_output":
                if item.call_id is None or item.output is None:
                    raise RequestError(f"{where}: a function_call_output needs call_id and output", param="input")
                turns.append(ChatMessage("tool", _text(item.output, where), tool_call_id=item.call_id))
            case kind:
                raise RequestError(f"{where}: items of type {kind[:64]!r} are not supported", param="input")
    return turns


def _assistant_turn(turns: list[ChatMessage]) -> ChatMessage:
    if not turns or turns[-1].role != "assistant":
        turns.append(ChatMessage("assistant"))
    return turns[-1]


def _text(content: str | Sequence[InputPart], where: str) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content:
        text = part.refusal if part.type == "refusal" else part.text if part.type in _TEXT_PARTS else None
        if text is None:
            raise RequestError(
                f"{where}: content of type {part.type[:64]!r} is not supported by this model; only text is",
                param="input",
            )
        texts.append(text)
    return "".join(texts)


def _tool(tool: ResponsesTool, index: int) -> ToolDefinition:
    if tool.type != "function" or tool.name is None:
        raise RequestError(
            f"tools.{index}: only functions with a name are supported, got type {tool.type[:64]!r}", param="tools"
        )
    return ToolDefinition(FunctionDefinition(tool.name, tool.description, tool.parameters, tool.strict))


def _tool_choice(choice: str | ResponsesToolChoice) -> ToolChoice:
    if not isinstance(choice, ResponsesToolChoice):
        return choice  # type: ignore[return-value]
    if choice.type != "function" or choice.name is None:
        raise RequestError(
            f"tool_choice of type {choice.type[:64]!r} is not supported; give a function's name", param="tool_choice"
        )
    return NamedToolChoice(FunctionName(choice.name))
