"""`POST /separate_reasoning` and `/parse_function_call`: the output parsers on their own, without a model."""

from typing import Any

import msgspec
from litestar import Request as HttpRequest
from litestar import post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from api.chat.schemas import ChatCompletionRequest, ChatMessage, ToolDefinition
from api.chat.tools import read_tools
from api.openapi import errors
from api.requests.builder import build
from api.requests.fields import check_fields
from api.server import Server
from jaxserve.errors import RequestError
from jaxserve.parsing.message import Message
from jaxserve.parsing.message_parser import MessageParserConfig
from jaxserve.parsing.reasoning.registry import REASONING_FORMATS
from jaxserve.parsing.tool_calls.registry import TOOL_CALL_FORMATS


class SeparateReasoningRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /separate_reasoning`."""

    text: str
    reasoning_parser: str


class SeparateReasoningResponse(msgspec.Struct):
    """Response body of `POST /separate_reasoning`."""

    reasoning_text: str
    text: str


class ParseFunctionCallRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /parse_function_call`."""

    text: str
    tools: list[ToolDefinition]
    tool_call_parser: str


class ParsedCall(msgspec.Struct):
    """One tool call; `parameters` is a JSON object as text."""

    tool_index: int
    name: str
    parameters: str


class ParseFunctionCallResponse(msgspec.Struct):
    """Response body of `POST /parse_function_call`."""

    normal_text: str
    calls: list[ParsedCall]


@post("/separate_reasoning", status_code=200, summary="Separate reasoning from content", responses=errors(body=True))
async def separate_reasoning(
    data: JSONBody[SeparateReasoningRequest], server: NamedDependency[Server], request: HttpRequest[Any, Any, Any]
) -> SeparateReasoningResponse:
    """Split a complete output into reasoning and content, as `--reasoning-parser` would."""
    check_fields(await request.json(), SeparateReasoningRequest, strict=server.settings.strict_params)
    format = REASONING_FORMATS.get(data.reasoning_parser.lower())
    if format is None:
        raise RequestError(f"reasoning_parser is one of {', '.join(REASONING_FORMATS)}", param="reasoning_parser")
    message = await build(len(data.text), _read, MessageParserConfig(reasoning=format), data.text)
    return SeparateReasoningResponse(message.reasoning, message.content)


@post("/parse_function_call", status_code=200, summary="Tool calls of a text", responses=errors(body=True))
async def parse_function_call(
    data: JSONBody[ParseFunctionCallRequest], server: NamedDependency[Server], request: HttpRequest[Any, Any, Any]
) -> ParseFunctionCallResponse:
    """Extract the tool calls of a complete output, as `--tool-call-parser` would."""
    check_fields(await request.json(), ParseFunctionCallRequest, strict=server.settings.strict_params)
    format = TOOL_CALL_FORMATS.get(data.tool_call_parser.lower())
    if format is None:
        raise RequestError(f"tool_call_parser is one of {', '.join(TOOL_CALL_FORMATS)}", param="tool_call_parser")
    tools = read_tools(ChatCompletionRequest(messages=list[ChatMessage](), tools=data.tools))
    callable_tools: Any = () if tools is None else tools.callable
    message = await build(
        len(data.text), _read, MessageParserConfig(tool_calls=format, tools=callable_tools), data.text
    )
    indices = {tool.name: index for index, tool in enumerate(callable_tools)}
    calls = [ParsedCall(indices[call.name], call.name, call.arguments) for call in message.calls.values()]
    return ParseFunctionCallResponse(message.content, calls)


def _read(config: MessageParserConfig, text: str) -> Message:
    parser = config.parser()
    return Message().add(parser.push(text)).add(parser.finish())
