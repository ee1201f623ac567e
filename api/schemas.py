"""OpenAI's wire format as msgspec structs, with SGLang's extensions. Fields keep the protocol's names."""

from typing import Any, Literal, TypeAlias

import msgspec


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class ContentPart(msgspec.Struct):
    """One part of a message's content; text is served, and an assistant's `thinking` or `refusal`."""

    type: str
    text: str | None = None
    thinking: str | None = None
    refusal: str | None = None


class CalledFunction(msgspec.Struct):
    """What a tool call calls; its arguments are a JSON object as text."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct):
    """One call of an assistant's message."""

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
    """Names a function."""

    name: str


class NamedToolChoice(msgspec.Struct):
    """Makes the model call one tool."""

    function: FunctionName
    type: Literal["function"] = "function"


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | NamedToolChoice
ReasoningEffort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class JsonSchemaFormat(msgspec.Struct):
    """The schema of an answer. Not strict: keywords that cannot be enforced are left out."""

    schema: dict[str, Any] | bool | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TagStructure(msgspec.Struct):
    """A tag whose inside follows a schema."""

    begin: str
    end: str
    schema: dict[str, Any] | bool | None = None


class ResponseFormat(msgspec.Struct):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[TagStructure] | None = None
    triggers: list[str] | None = None


class ReasoningOptions(msgspec.Struct):
    """How much the model thinks."""

    effort: ReasoningEffort | None = None
    enabled: bool | None = None


class CommonRequest(msgspec.Struct, kw_only=True):
    """Fields of both generation endpoints. `None` means the endpoint's default."""

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


class CompletionRequest(CommonRequest, kw_only=True):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = None


class PromptTokensDetails(msgspec.Struct):
    """Where prompt tokens came from."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    """What output tokens were spent on."""

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
    """Answer of `POST /v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageInfo
    object: Literal["chat.completion"] = "chat.completion"


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    """More of a called function: its name comes first, then pieces of its arguments."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """More of a tool call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta | None = None


class ChatDelta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds to a message."""

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


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a text choice, one entry per token in each list; the first prompt token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One choice, whole or as a chunk of a stream."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None
    matched_stop: int | str | None = None


class Completion(msgspec.Struct):
    """Answer of `POST /v1/completions`, and one event of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageInfo | None | msgspec.UnsetType = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"


class ModelCard(msgspec.Struct):
    """One served model."""

    id: str
    created: int
    max_model_len: int
    root: str
    parent: str | None = None
    owned_by: str = "jaxserve"
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct):
    """Answer of `GET /v1/models`."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class ErrorInfo(msgspec.Struct):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """Body of every error answer."""

    error: ErrorInfo


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /tokenize`: a prompt, or messages that go through the chat template."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[ToolDefinition] | None = None
    add_special_tokens: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    model: str | None = None


class TokenizeResponse(msgspec.Struct):
    """Answer of `POST /tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /detokenize`."""

    tokens: list[int]
    skip_special_tokens: bool = False
    model: str | None = None


class DetokenizeResponse(msgspec.Struct):
    """Answer of `POST /detokenize`."""

    text: str


class AbortBody(msgspec.Struct, kw_only=True):
    """Body of `POST /abort_request`: a request id (or the start of some), or all."""

    rid: str = ""
    abort_all: bool = False


class LoadAdapterBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /load_lora_adapter`; the path is below `--lora-root`."""

    lora_name: str
    lora_path: str
    pinned: bool = False


class UnloadAdapterBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /unload_lora_adapter`."""

    lora_name: str


class AdapterAnswer(msgspec.Struct):
    """Answer to both: what was wrong, if anything, and the paths of what is loaded now, by name."""

    success: bool
    error_message: str | None
    loaded_adapters: dict[str, str]


class FlushResponse(msgspec.Struct):
    """Answer of `POST /flush_cache`."""

    flushed: bool
