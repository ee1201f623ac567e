"""Wire format of chat completions."""

from typing import Any, Literal, TypeAlias

import msgspec

from api.requests.schemas import ChatLogprobs, CommonRequest, ReasoningEffort, ReasoningOptions, UsageInfo


class ContentPart(msgspec.Struct):
    """One part of a message's content: text, or in an assistant's message also `thinking` or `refusal`."""

    type: str
    text: str | None = None
    thinking: str | None = None
    refusal: str | None = None


class CalledFunction(msgspec.Struct):
    """The function of a tool call; its arguments are a JSON object as text."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct):
    """One tool call in an assistant's message."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(msgspec.Struct):
    """One turn of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionDefinition(msgspec.Struct):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(msgspec.Struct):
    """An entry of `tools`."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class FunctionName(msgspec.Struct):
    """The name of a function."""

    name: str


class NamedToolChoice(msgspec.Struct):
    """Forces the model to call one tool."""

    function: FunctionName
    type: Literal["function"] = "function"


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | NamedToolChoice


class ChatCompletionRequest(CommonRequest, kw_only=True):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    reasoning: ReasoningOptions | None = None
    thinking_budget: int | None = None


class AssistantMessage(msgspec.Struct):
    """The model's turn."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None


class ChatChoice(msgspec.Struct):
    """One finished choice."""

    index: int
    message: AssistantMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None
    matched_stop: int | str | None = None


class ChatCompletion(msgspec.Struct):
    """Response body of `POST /v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageInfo
    object: Literal["chat.completion"] = "chat.completion"


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    """A delta of a called function: its name comes first, then chunks of its arguments."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """A delta of a tool call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta | None = None


class ChatDelta(msgspec.Struct, omit_defaults=True):
    """A delta of a message."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(msgspec.Struct):
    """One choice of a chunk."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    matched_stop: int | str | None | msgspec.UnsetType = msgspec.UNSET


class ChatCompletionChunk(msgspec.Struct):
    """One event of a chat stream."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageInfo | None | msgspec.UnsetType = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
