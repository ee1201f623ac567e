"""Wire format of text completions."""

from typing import Literal

import msgspec

from api.requests.schemas import CommonRequest, CompletionLogprobs, UsageInfo


class CompletionRequest(CommonRequest, kw_only=True):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = None


class CompletionChoice(msgspec.Struct):
    """One choice, either complete or a chunk of a stream."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None
    matched_stop: int | str | None = None


class Completion(msgspec.Struct):
    """Response body of `POST /v1/completions`, and one event of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageInfo | None | msgspec.UnsetType = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"
