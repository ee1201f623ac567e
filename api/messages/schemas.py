"""Anthropic's Messages protocol as msgspec structs. Fields keep the protocol's names."""

from typing import Any, Literal

import msgspec


class TextBlockIn(msgspec.Struct, tag_field="type", tag="text"):
    """Text in an input message."""

    text: str
    cache_control: dict[str, Any] | None = None


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    """A tool call by the model."""

    id: str
    name: str
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None


class ToolResultBlock(msgspec.Struct, tag_field="type", tag="tool_result"):
    """The result of a tool call."""

    tool_use_id: str
    content: str | list[TextBlockIn] | None = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    """The model's thinking."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(msgspec.Struct, tag_field="type", tag="redacted_thinking"):
    """Redacted thinking, which cannot be read and is ignored."""

    data: str


class InputMessage(msgspec.Struct):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[TextBlockIn | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock]


class MessagesTool(msgspec.Struct):
    """A function that the model may call; `input_schema` is a JSON schema."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None


class MessagesToolChoice(msgspec.Struct):
    """Which tools the model may or must call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingOptions(msgspec.Struct):
    """Whether the model thinks, and its maximum number of thinking tokens."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class CountTokensRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /v1/messages/count_tokens`."""

    messages: list[InputMessage]
    model: str | None = None
    system: str | list[TextBlockIn] | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingOptions | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """Body of `POST /v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    """Text in a response."""

    text: str
    citations: None = None


class MessagesUsage(msgspec.Struct):
    """Token counts; `input_tokens` excludes cached tokens."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class MessagesResponse(msgspec.Struct):
    """Response body of `POST /v1/messages`."""

    id: str
    model: str
    content: list[ThinkingBlock | TextBlock | ToolUseBlock]
    usage: MessagesUsage
    stop_reason: str | None = None
    stop_sequence: str | None = None
    role: Literal["assistant"] = "assistant"
    type: Literal["message"] = "message"


class CountTokensResponse(msgspec.Struct):
    """Response body of `POST /v1/messages/count_tokens`."""

    input_tokens: int
