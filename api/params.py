"""From wire requests to valid engine requests. All checks that can be made before a token is drawn are made here."""

import asyncio
import math
import random
import secrets
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import msgspec

from api.schemas import ChatCompletionRequest, ChatMessage, CommonRequest, CompletionRequest, TokenizeRequest
from jaxserve.errors import RequestError
from jaxserve.generation import TextOptions
from jaxserve.generation_config import GenerationConfig
from jaxserve.messages import EngineInfo
from jaxserve.request import MAX_CHOICES, MAX_LOGPROBS, Request, SamplingParams
from jaxserve.text.tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")

_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 256
_MAX_PROMPTS = 128
_MAX_SALT_CHARACTERS = 256
_MAX_MESSAGES = 2048
_ROLES = ("system", "user", "assistant", "tool", "developer", "function")
_COMPLETION_MAX_TOKENS = 16
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "min_tokens",
    "ignore_eos",
)
_MAX_REQUEST_ID_CHARACTERS = 256
# Larger bodies are rendered and tokenised in a thread: the streams of others must go on meanwhile.
_LARGE_BODY_BYTES = 16 << 10


class Prepared(NamedTuple):
    """A wire request, ready for the engine."""

    request: Request
    options: TextOptions


# Accepted and not used: they change nothing that this server does.
IGNORED_FIELDS = frozenset(
    {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
)


def check_fields(raw: Any, schema: type[msgspec.Struct]) -> None:
    """Refuse fields that are neither honoured nor documented as ignored; null is as good as absent.

    Args:
        raw: the decoded body.
        schema: what it was read as.

    Raises:
        RequestError: names the first such field.
    """
    known = IGNORED_FIELDS.union(schema.__struct_fields__)
    for name, value in raw.items() if isinstance(raw, dict) else ():
        if name not in known and value is not None:
            raise RequestError(f"{str(name)[:64]!r} is not supported by this server", param=str(name)[:64])


class SeedSource:
    """Seeds for requests that bring none; the same sequence again for the same `--random-seed`."""

    def __init__(self, seed: int | None) -> None:
        self._random = random.Random(secrets.randbits(64) if seed is None else seed)

    def draw(self) -> int:
        """A seed in [0, 2**63)."""
        return self._random.getrandbits(63)


class RequestBuilder:
    """Builds engine requests for one model.

    Args:
        tokenizer: of the served model.
        info: limits of the engine.
        seeds: where unset seeds come from.
        generation: the model's own sampling defaults, for chats, and end tokens.
    """

    def __init__(self, tokenizer: Tokenizer, info: EngineInfo, seeds: SeedSource, generation: GenerationConfig) -> None:
        self._tokenizer = tokenizer
        self._info = info
        self._seeds = seeds
        self._defaults = generation.sampling
        self._eos_token_ids = tuple(sorted({*info.eos_token_ids, *tokenizer.eos_token_ids, *generation.eos_token_ids}))

    def chat(self, body: ChatCompletionRequest) -> Prepared:
        """One conversation."""
        _check_common(body)
        prompt = self.render(body.messages, body.chat_template_kwargs, continue_final=bool(body.continue_final_message))
        # The template has written the special tokens already.
        limit = self._info.context_length
        ids = self._tokenizer.encode(prompt, add_special_tokens=False, max_tokens=limit, param="messages")
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        _check_range("top_logprobs", body.top_logprobs, 0, MAX_LOGPROBS)
        max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        max_tokens = self._max_tokens(len(ids), max_tokens, "messages")
        sampling = self._sampling(body, max_tokens, num_logprobs, self._defaults)
        return Prepared(self._request(body, ids, sampling, body.n or 1), _text_options(body))

    def completions(self, body: CompletionRequest) -> list[Prepared]:
        """One request per prompt."""
        _check_common(body)
        num_choices = body.n or 1
        best_of = num_choices if body.best_of is None else body.best_of
        _check_range("best_of", best_of, num_choices, MAX_CHOICES)
        if body.stream and best_of > num_choices:
            raise RequestError("best_of above n cannot be streamed", param="best_of")
        _check_range("logprobs", body.logprobs, 0, MAX_LOGPROBS)
        # Ranking needs log-probabilities whether or not the client wants to see them.
        num_logprobs = 0 if body.logprobs is None and best_of > num_choices else body.logprobs
        max_tokens = _COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        prepared: list[Prepared] = []
        echo_logprobs = bool(body.echo) and body.logprobs is not None
        for ids in self.completion_prompts(body.prompt):
            limit = self._max_tokens(len(ids), max_tokens, "prompt")
            sampling = self._sampling(body, limit, num_logprobs, {}, echo_logprobs=echo_logprobs)
            prepared.append(Prepared(self._request(body, ids, sampling, best_of), _text_options(body)))
        return prepared

    def render(
        self, messages: list[ChatMessage], kwargs: Mapping[str, Any] | None, *, continue_final: bool = False
    ) -> str:
        """Messages to a prompt."""
        if not messages:
            raise RequestError("messages must not be empty", param="messages")
        if len(messages) > _MAX_MESSAGES:
            raise RequestError(f"{len(messages)} messages, the limit is {_MAX_MESSAGES}", param="messages")
        if continue_final and messages[-1].role != "assistant":
            raise RequestError(
                "continue_final_message needs the last message to be the assistant's", param="continue_final_message"
            )
        turns = [_template_message(message, index) for index, message in enumerate(messages)]
        return self._tokenizer.chat_template.render(turns, kwargs or {}, continue_final_message=continue_final)

    def completion_prompts(self, prompt: str | list[str | int | list[int]]) -> list[list[int]]:
        """Token ids of each prompt."""
        if isinstance(prompt, str):
            prompts: list[Any] = [prompt]
        elif prompt and all(isinstance(item, int) for item in prompt):
            prompts = [prompt]
        else:
            prompts = list(prompt)
        if not 1 <= len(prompts) <= _MAX_PROMPTS:
            raise RequestError(f"between 1 and {_MAX_PROMPTS} prompts, got {len(prompts)}", param="prompt")
        return [self._prompt_ids(item) for item in prompts]

    def tokens(self, body: TokenizeRequest) -> list[int]:
        """Token ids of a prompt, or of messages through the chat template."""
        limit = self._info.context_length
        if body.messages is not None and body.prompt is None:
            text = self.render(body.messages, body.chat_template_kwargs)
            return self._tokenizer.encode(text, add_special_tokens=False, max_tokens=limit, param="messages")
        if body.prompt is None or body.messages is not None:
            raise RequestError("give prompt or messages, and not both", param="prompt")
        return self._tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens, max_tokens=limit)

    def _prompt_ids(self, prompt: Any) -> list[int]:
        limit = self._info.context_length
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt, add_special_tokens=True, max_tokens=limit)
        elif isinstance(prompt, list):
            ids = prompt
            for token_id in ids:
                if not isinstance(token_id, int) or not 0 <= token_id < self._info.vocab_size:
                    raise RequestError(
                        f"prompt: token id {token_id!r} is outside the vocabulary of {self._info.vocab_size}",
                        param="prompt",
                    )
        else:
            raise RequestError("prompt must be text or token ids, and not both in one list", param="prompt")
        if not ids:
            raise RequestError("prompt must not be empty", param="prompt")
        return ids

    def _request(self, body: CommonRequest, ids: list[int], sampling: SamplingParams, num_choices: int) -> Request:
        return Request(
            # Never the client's `rid`: what is still on its way for an ended request must not meet a new one.
            id=uuid.uuid4().hex,
            prompt_token_ids=tuple(ids),
            sampling=sampling,
            eos_token_ids=self._eos_token_ids,
            num_choices=num_choices,
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
        )

    def _sampling(
        self,
        body: CommonRequest,
        max_tokens: int,
        num_logprobs: int | None,
        defaults: Mapping[str, Any],
        *,
        echo_logprobs: bool = False,
    ) -> SamplingParams:
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
        sampling = SamplingParams(
            **{**defaults, **given},
            seed=self._seeds.draw() if body.seed is None else body.seed,
            logit_bias=_logit_bias(body.logit_bias or {}),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            max_tokens=max_tokens,
            num_logprobs=num_logprobs,
            prompt_logprobs=echo_logprobs,
        )
        sampling.check_token_ids(self._info.vocab_size)
        return sampling

    def _max_tokens(self, num_prompt_tokens: int, max_tokens: int | None, prompt_param: str) -> int:
        limit = self._info.context_length
        if num_prompt_tokens >= limit:
            raise RequestError(
                f"the prompt of {num_prompt_tokens} tokens is longer than the model's context length of {limit} tokens "
                "leaves room for",
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
    """Id of a new answer: the client's own `rid`, or a fresh one that starts with `kind`."""
    if rid is None:
        return f"{kind}-{uuid.uuid4().hex}"
    if not (1 <= len(rid) <= _MAX_REQUEST_ID_CHARACTERS and rid.isprintable()):
        raise RequestError(f"rid must have 1 to {_MAX_REQUEST_ID_CHARACTERS} printable characters", param="rid")
    return rid


async def build(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a method of the builder for a body of `size` bytes: small ones at once, large ones in a thread."""
    if size < _LARGE_BODY_BYTES:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


def _check_range(param: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise RequestError(f"{param} must be between {low} and {high}, got {value}", param=param)


def _check_common(body: CommonRequest) -> None:
    _check_range("n", body.n, 1, MAX_CHOICES)
    _check_range("priority", body.priority, -(2**31), 2**31 - 1)
    if body.cache_salt is not None and len(body.cache_salt) > _MAX_SALT_CHARACTERS:
        raise RequestError(
            f"cache_salt has {len(body.cache_salt)} characters, the limit is {_MAX_SALT_CHARACTERS}", param="cache_salt"
        )
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    if body.user is not None and len(body.user) > 512:
        raise RequestError(f"user has {len(body.user)} characters, the limit is 512", param="user")


def _logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    result: dict[int, float] = {}
    for key, value in bias.items():
        # isdecimal alone would let other scripts' digits through.
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError(f"logit_bias keys are token ids, got {key!r}", param="logit_bias")
        if not math.isfinite(value):
            raise RequestError(
                f"logit_bias of token {key} must be between -100 and 100, got {value}", param="logit_bias"
            )
        result[int(key)] = value
    return result


def _text_options(body: CommonRequest) -> TextOptions:
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stops) > _MAX_STOPS:
        raise RequestError(f"{len(stops)} stop strings, the limit is {_MAX_STOPS}", param="stop")
    for stop in stops:
        if not 1 <= len(stop) <= _MAX_STOP_CHARACTERS:
            raise RequestError(
                f"stop strings have 1 to {_MAX_STOP_CHARACTERS} characters, got {len(stop)}", param="stop"
            )
    return TextOptions(
        stop=stops,
        keep_stop=bool(body.no_stop_trim),
        skip_special_tokens=True if body.skip_special_tokens is None else body.skip_special_tokens,
    )


def _template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    where = f"messages.{index}"
    role = message.role.lower()
    if role not in _ROLES:
        raise RequestError(f"{where}: role must be one of {', '.join(_ROLES)}, got {message.role!r}", param="messages")
    if message.tool_calls:
        raise RequestError(f"{where}: tool_calls are not supported by this server", param="messages")
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise RequestError(
                    f"{where}: content parts of type {part.type!r} are not supported by this model; only text is",
                    param="messages",
                )
        content = "".join(part.text or "" for part in content)
    if content is None:
        raise RequestError(f"{where}: content must not be null", param="messages")
    turn: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        turn["name"] = message.name
    if message.reasoning_content is not None:
        turn["reasoning_content"] = message.reasoning_content
    return turn
