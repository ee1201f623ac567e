"""Builds valid engine requests from wire requests: code shared by the endpoints.

Everything that can be checked before a token is sampled is checked here.
"""

import asyncio
import random
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, ParamSpec, TypeVar

from api.requests.fields import read_logit_bias, read_stops
from api.requests.model_names import ModelNames
from api.requests.schemas import CommonRequest
from jaxserve.engine.messages import EngineInfo
from jaxserve.engine.output_processor import TextOptions
from jaxserve.errors import RequestError
from jaxserve.loading.generation_config import GenerationConfig
from jaxserve.parsing.message_parser import ParserSelection
from jaxserve.request import Request
from jaxserve.sampling_params import SAMPLING_FIELDS, SamplingParams
from jaxserve.structured.grammar import GrammarWriter, JsonStyle
from jaxserve.text.completion_template import CompletionTemplate
from jaxserve.text.tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")

_MAX_REQUEST_ID_CHARACTERS = 256
# Larger bodies are rendered and tokenised in a thread, so that they do not stall the streams of other requests.
_LARGE_BODY_BYTES = 16 << 10


class Prepared(NamedTuple):
    """An engine request that is complete except for the check of its grammar.

    Attributes:
        model: name of the model in the response.
        request: the engine request.
        options: options for converting its output to text.
        grammar_param: the request field that requires the grammar.
    """

    model: str
    request: Request
    options: TextOptions
    grammar_param: str | None = None


class SeedSource:
    """Generates seeds for requests that set none; the sequence is determined by `--random-seed` if given."""

    def __init__(self, seed: int | None) -> None:
        self._random = random.Random(secrets.randbits(64) if seed is None else seed)

    def next(self) -> int:
        """Return a seed in [0, 2**63)."""
        return self._random.getrandbits(63)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The properties of the served model that requests are built from.

    Attributes:
        tokenizer: tokenizer of the model.
        info: limits of the engine.
        generation: sampling defaults, and additional end tokens.
        formats: parsers of reasoning and tool calls in outputs.
        json_style: whitespace rules for constrained JSON.
        completion_template: combines a prompt and a suffix; None if the model cannot fill in the middle.
        names: names of the model and its adapters.
    """

    tokenizer: Tokenizer
    info: EngineInfo
    generation: GenerationConfig
    formats: ParserSelection
    json_style: JsonStyle
    completion_template: CompletionTemplate | None
    names: ModelNames

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an output."""
        own = self.generation.eos_token_ids
        return tuple(sorted({*self.info.eos_token_ids, *self.tokenizer.eos_token_ids, *own}))

    @cached_property
    def grammars(self) -> GrammarWriter:
        """A writer of grammars over the model's tokens."""
        return GrammarWriter(self.tokenizer, self.json_style)


class RequestBuilder:
    """Builds engine requests for one model; the build functions of the endpoints use it.

    Args:
        model: the served model.
        seeds: source of seeds for requests that set none.
    """

    def __init__(self, model: ServedModel, seeds: SeedSource) -> None:
        self.model = model
        self._seeds = seeds

    def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        """Tokenise a prompt; raises RequestError if it cannot fit the context."""
        limit = self.model.info.context_length
        return self.model.tokenizer.encode(text, add_special_tokens=add_special_tokens, max_tokens=limit, param=param)

    def request(self, body: CommonRequest, ids: list[int], **fields: Any) -> Request:
        """Create a request from token ids; `fields` are the fields of `Request` that the endpoint decides."""
        return Request(
            # Never the client's `rid`: messages in flight for an ended request must not reach a new one.
            id=uuid.uuid4().hex,
            prompt_token_ids=tuple(ids),
            eos_token_ids=self.model.eos_token_ids,
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
            **fields,
        )

    def sampling(self, body: CommonRequest, defaults: Mapping[str, Any], **fields: Any) -> SamplingParams:
        """Create sampling parameters; `fields` are the fields of `SamplingParams` that the endpoint decides."""
        names = (field.name for field in SAMPLING_FIELDS)
        given = {name: value for name in names if (value := getattr(body, name)) is not None}
        sampling = SamplingParams(
            **{**defaults, **given},
            seed=self._seeds.next() if body.seed is None else body.seed,
            logit_bias=read_logit_bias(body.logit_bias or {}),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            **fields,
        )
        sampling.check_token_ids(self.model.info.vocab_size)
        return sampling

    def text_options(self, body: CommonRequest, **fields: Any) -> TextOptions:
        """Create text options; `fields` are the fields of `TextOptions` that the endpoint decides."""
        return TextOptions(
            stop=read_stops(body.stop),
            keep_stop=bool(body.no_stop_trim),
            skip_special_tokens=True if body.skip_special_tokens is None else body.skip_special_tokens,
            **fields,
        )

    def max_tokens(self, num_prompt_tokens: int, max_tokens: int | None, prompt_param: str) -> int:
        """Return the maximum number of output tokens; unset means the rest of the context."""
        limit = self.model.info.context_length
        if num_prompt_tokens >= limit:
            raise RequestError(
                f"the prompt of {num_prompt_tokens} tokens leaves no room for output in the model's context length of "
                f"{limit} tokens",
                param=prompt_param,
                code="context_length_exceeded",
            )
        if max_tokens is None:
            return limit - num_prompt_tokens
        if max_tokens < 0:
            raise RequestError(f"max_tokens must not be negative, got {max_tokens}", param="max_tokens")
        if num_prompt_tokens + max_tokens > limit:
            raise RequestError(
                f"the prompt of {num_prompt_tokens} tokens and max_tokens of {max_tokens} exceed "
                f"the model's context length of {limit} tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return max_tokens


def answer_id(kind: str, rid: str | None) -> str:
    """Return the id of a new response: the client's `rid`, or a fresh id that starts with `kind`."""
    if rid is None:
        return f"{kind}{uuid.uuid4().hex}"
    if not (1 <= len(rid) <= _MAX_REQUEST_ID_CHARACTERS and rid.isprintable()):
        raise RequestError(f"rid must have 1 to {_MAX_REQUEST_ID_CHARACTERS} printable characters", param="rid")
    return rid


async def build(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a build function for a body of `size` bytes: directly if the body is small, in a thread if it is large."""
    if size < _LARGE_BODY_BYTES:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)
