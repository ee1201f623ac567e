"""Reads `tools` and `tool_choice` of a request."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from api.chat.schemas import ChatCompletionRequest, NamedToolChoice, ToolDefinition
from jaxserve.errors import RequestError
from jaxserve.parsing.tool_calls.registry import ToolCallFormat
from jaxserve.parsing.tool_calls.tool import Tool
from jaxserve.structured.grammar import GrammarPart, GrammarWriter

_MAX_TOOLS = 256
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """The tools of a request, and how the model may call them.

    Attributes:
        template_tools: definitions that are passed to the chat template.
        callable: tools that the model may call.
        forced: the model must call a tool.
        parallel: the model may make several calls.
    """

    template_tools: Sequence[dict[str, Any]]
    callable: Sequence[Tool]
    forced: bool
    parallel: bool

    def grammar(self, writer: GrammarWriter, format: ToolCallFormat) -> GrammarPart | None:
        """Return the grammar that the output must follow for its calls to be valid; None for no constraint."""
        if self.forced:
            return format.syntax.calls(writer, self.callable, parallel=self.parallel)
        if any(tool.strict for tool in self.callable):
            return format.syntax.text_and_calls(writer, self.callable, parallel=self.parallel)
        return None


def read_tools(body: ChatCompletionRequest) -> ToolUse | None:
    """Return the request's tools, or None if none may be called.

    Raises:
        RequestError: the definitions or the tool choice are not valid.
    """
    if not body.tools:
        if body.tool_choice in (None, "none", "auto"):
            return None
        raise RequestError(f"tool_choice {_to_json(body.tool_choice)} needs tools", param="tool_choice")
    if len(body.tools) > _MAX_TOOLS:
        raise RequestError(f"{len(body.tools)} tools, the limit is {_MAX_TOOLS}", param="tools")
    tools = [_tool(definition, index) for index, definition in enumerate(body.tools)]
    names = [tool.name for tool in tools]
    if len(set(names)) != len(names):
        raise RequestError("tool names must be unique", param="tools")
    template_tools = [_template_tool(definition) for definition in body.tools]
    parallel = body.parallel_tool_calls is not False
    match body.tool_choice:
        case "none":
            return None
        case NamedToolChoice(function=function):
            if function.name not in names:
                raise RequestError(
                    f"tool_choice names {function.name!r}; tools has {', '.join(names)}", param="tool_choice"
                )
            index = names.index(function.name)
            return ToolUse(template_tools=[template_tools[index]], callable=[tools[index]], forced=True, parallel=False)
        case choice:
            return ToolUse(
                template_tools=template_tools, callable=tools, forced=choice == "required", parallel=parallel
            )


def _tool(definition: ToolDefinition, index: int) -> Tool:
    function = definition.function
    if not _NAME.fullmatch(function.name):
        raise RequestError(
            f"tools.{index}: a name has 1 to 128 letters, digits, '_', '-' or '.', got {function.name[:140]!r}",
            param="tools",
        )
    parameters = function.parameters or {}
    if parameters.get("type", "object") != "object":
        raise RequestError(
            f"tools.{index}: parameters must describe an object, got type {parameters['type']!r}", param="tools"
        )
    return Tool(name=function.name, parameters=parameters, strict=bool(function.strict))


def _template_tool(definition: ToolDefinition) -> dict[str, Any]:
    function: dict[str, Any] = {"name": definition.function.name, "description": definition.function.description or ""}
    function["parameters"] = definition.function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _to_json(choice: Any) -> str:
    return msgspec.json.encode(choice).decode()
