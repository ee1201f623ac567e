"""OpenAI's Responses protocol as msgspec structs. Fields keep the protocol's names."""

from typing import Any, Literal, TypeAlias

import msgspec

from api.requests.schemas import ErrorInfo, ReasoningEffort


class InputPart(msgspec.Struct):
    """One part of an input item's content; only text and refusals are supported."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct):
    """One item of `input`: a message, a call, a call's output, or reasoning, distinguished by `type`."""

    type: str = "message"
    role: str | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None
    id: str | None = None
    status: str | None = None


class ResponsesTool(msgspec.Struct):
    """A tool; only functions are supported."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesToolChoice(msgspec.Struct):
    """Forces the model to call one function."""

    type: str
    name: str | None = None


class TextFormat(msgspec.Struct):
    """The required format of the output text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct):
    """Options of the output text."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningSettings(msgspec.Struct):
    """Options of the model's thinking."""

    effort: ReasoningEffort | None = None
    summary: str | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /v1/responses`."""

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningSettings | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None


class OutputText(msgspec.Struct):
    """Text of an output message."""

    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []
    type: Literal["output_text"] = "output_text"


class ReasoningText(msgspec.Struct):
    """Text of the model's thinking."""

    text: str
    type: Literal["reasoning_text"] = "reasoning_text"


ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(msgspec.Struct, tag_field="type", tag="message"):
    """A message of the model."""

    id: str
    status: ItemStatus
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class OutputReasoning(msgspec.Struct, tag_field="type", tag="reasoning"):
    """The model's thinking."""

    id: str
    status: ItemStatus
    content: list[ReasoningText]
    summary: list[Any] = []


class OutputCall(msgspec.Struct, tag_field="type", tag="function_call"):
    """A function call."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem: TypeAlias = OutputMessage | OutputReasoning | OutputCall


class InputTokensDetails(msgspec.Struct):
    """Breakdown of the input tokens."""

    cached_tokens: int


class OutputTokensDetails(msgspec.Struct):
    """Breakdown of the output tokens."""

    reasoning_tokens: int


class ResponsesUsage(msgspec.Struct):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct):
    """The reason why a response is incomplete."""

    reason: str


ResponseStatus: TypeAlias = Literal["in_progress", "completed", "incomplete", "cancelled", "failed"]


class ResponseObject(msgspec.Struct, kw_only=True):
    """Response body of `POST /v1/responses`."""

    id: str
    created_at: int
    model: str
    status: ResponseStatus
    output: list[OutputItem]
    parallel_tool_calls: bool
    tool_choice: Any
    tools: list[ResponsesTool]
    text: TextOptions
    temperature: float | None
    top_p: float | None
    truncation: str = "disabled"
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    reasoning: ReasoningSettings | None = None
    store: bool = True
    metadata: dict[str, str] = {}
    user: str | None = None
    usage: ResponsesUsage | None = None
    error: ErrorInfo | None = None
    incomplete_details: IncompleteDetails | None = None
    object: Literal["response"] = "response"


class DeletedResponse(msgspec.Struct):
    """Response body of `DELETE /v1/responses/{id}`."""

    id: str
    deleted: bool = True
    object: Literal["response"] = "response"
