"""Converts a request's messages to the dicts that chat templates expect."""

import json
from collections.abc import Sequence
from typing import Any

from api.chat.schemas import ChatMessage, ContentPart, ToolCall
from jaxserve.errors import RequestError

_MAX_MESSAGES = 2048
_ROLES = ("system", "user", "assistant", "tool", "developer", "function")


def template_messages(messages: Sequence[ChatMessage], template: str) -> list[dict[str, Any]]:
    """Return the messages with plain text as content and with tool call arguments as objects.

    Args:
        messages: messages of the request.
        template: source of the chat template; roles and fields that it does not know are mapped to ones that it does.

    Raises:
        RequestError: a message is not valid; the error names the message and the problem.
    """
    if not messages:
        raise RequestError("messages must not be empty", param="messages")
    if len(messages) > _MAX_MESSAGES:
        raise RequestError(f"{len(messages)} messages, the limit is {_MAX_MESSAGES}", param="messages")
    return [_turn(message, f"messages.{index}", template) for index, message in enumerate(messages)]


def _turn(message: ChatMessage, where: str, template: str) -> dict[str, Any]:
    role = message.role.lower()
    if role not in _ROLES:
        raise RequestError(f"{where}: role must be one of {', '.join(_ROLES)}, got {message.role!r}", param="messages")
    if message.tool_calls and role != "assistant":
        raise RequestError(f"{where}: tool_calls belong to assistant messages", param="messages")
    if message.content is None and not (role == "assistant" and (message.tool_calls or message.reasoning_content)):
        raise RequestError(f"{where}: content must not be null", param="messages")
    if role == "developer" and "developer" not in template:
        role = "system"
    if role == "function":
        role = "tool"
    turn: dict[str, Any] = {"role": role, "content": _text(message, where, " " if role == "tool" else "")}
    reasoning = message.reasoning_content or _thinking(message)
    if reasoning is not None:
        turn["reasoning_content"] = reasoning
        if "message.thinking" in template:
            turn["thinking"] = reasoning
    if message.tool_calls:
        turn["tool_calls"] = [_tool_call(call, where) for call in message.tool_calls]
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            turn[name] = value
    return turn


def _text(message: ChatMessage, where: str, separator: str) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    texts = [_part_text(part, message.role, where) for part in message.content]
    return separator.join(text for text in texts if text is not None)


def _part_text(part: ContentPart, role: str, where: str) -> str | None:
    if part.type == "text" and part.text is not None:
        return part.text
    if role == "assistant" and part.type == "refusal" and part.refusal is not None:
        return part.refusal
    if role == "assistant" and part.type in ("thinking", "reasoning") and (part.thinking or part.text) is not None:
        return None
    raise RequestError(
        f"{where}: content parts of type {part.type!r} are not supported by this model; only text is", param="messages"
    )


def _thinking(message: ChatMessage) -> str | None:
    parts = message.content if isinstance(message.content, list) else []
    texts = [part.thinking or part.text or "" for part in parts if part.type in ("thinking", "reasoning")]
    return "".join(texts) if texts else None


def _tool_call(call: ToolCall, where: str) -> dict[str, Any]:
    try:
        # As lenient as the parsers of the model's own tool calls.
        arguments: Any = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(
            f"{where}: arguments of the call {call.id!r} must be a JSON object as text", param="messages"
        )
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
