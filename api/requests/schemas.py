"""OpenAI's wire format with SGLang's extensions, as msgspec structs. Fields have the protocol's names."""

from typing import Any, Literal, TypeAlias

import msgspec


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Options for token usage in a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


ReasoningEffort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class JsonSchemaFormat(msgspec.Struct):
    """The JSON schema of an output; unless `strict` is set, keywords that cannot be enforced are ignored."""

    schema: dict[str, Any] | bool | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TagStructure(msgspec.Struct):
    """A tag whose content follows a JSON schema."""

    begin: str
    end: str
    schema: dict[str, Any] | bool | None = None


class ResponseFormat(msgspec.Struct):
    """The required format of an output."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[TagStructure] | None = None
    triggers: list[str] | None = None


class ReasoningOptions(msgspec.Struct):
    """Options of the model's thinking."""

    effort: ReasoningEffort | None = None
    enabled: bool | None = None


class CommonRequest(msgspec.Struct, kw_only=True):
    """Fields shared by both generation endpoints. `None` means the endpoint's default."""

    model: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    ignore_eos: bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    no_stop_trim: bool | None = None
    skip_special_tokens: bool | None = None
    user: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    rid: str | None = None
    lora_path: str | list[str | None] | None = None


class PromptTokensDetails(msgspec.Struct):
    """Breakdown of the prompt tokens."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    """Breakdown of the output tokens."""

    reasoning_tokens: int = 0


class UsageInfo(msgspec.Struct):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(msgspec.Struct):
    """An alternative token."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    """An output token, its log-probability and its likeliest alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a chat choice."""

    content: list[ChatTokenLogprob]


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a text choice: lists with one entry per token; the first prompt token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ErrorInfo(msgspec.Struct):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """Body of every error response."""

    error: ErrorInfo
