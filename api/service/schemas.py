"""Request and response bodies of the routes other than generation."""

from typing import Any, Literal

import msgspec

from api.chat.schemas import ChatMessage, ToolDefinition


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
    """Response body of `GET /v1/models`."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /tokenize`: a prompt, or messages that are rendered with the chat template."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[ToolDefinition] | None = None
    add_special_tokens: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    model: str | None = None


class TokenizeResponse(msgspec.Struct):
    """Response body of `POST /tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /detokenize`."""

    tokens: list[int]
    skip_special_tokens: bool = False
    model: str | None = None


class DetokenizeResponse(msgspec.Struct):
    """Response body of `POST /detokenize`."""

    text: str


class AbortBody(msgspec.Struct, kw_only=True):
    """Body of `POST /abort_request`: a response id or a prefix of response ids, or all requests."""

    rid: str = ""
    abort_all: bool = False


class FlushResponse(msgspec.Struct):
    """Response body of `POST /flush_cache`."""

    flushed: bool
