"""Checks of a request's fields: which ones are known, and ranges that both generation endpoints share."""

import logging
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import msgspec
import msgspec.inspect

from api.requests.schemas import CommonRequest
from jaxserve.errors import RequestError
from jaxserve.request import MAX_CHOICES

logger = logging.getLogger(__name__)

_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 256
_MAX_SALT_CHARACTERS = 256

# Accepted and ignored: they affect nothing that this server does. docs/serving/openai-api.md lists them.
IGNORED_FIELDS = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
# Fields of OpenAI's and SGLang's protocols that would change the response and are not supported.
REFUSED_FIELDS = frozenset(
    {
        "audio",
        "background",
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "conversation",
        "custom_logit_processor",
        "custom_params",
        "extra_key",
        "function_call",
        "functions",
        "input_ids",
        "max_tool_calls",
        "prompt",
        "return_hidden_states",
        "return_routed_experts",
        "return_token_ids",
        "session_id",
        "session_params",
        "stop_regex",
        "web_search_options",
    }
)


def check_fields(raw: Any, schema: type[msgspec.Struct], *, strict: bool) -> None:
    """Refuse or log fields that are neither supported nor documented as ignored.

    Fields whose value is null, false or empty count as absent.

    Args:
        raw: the decoded JSON body.
        schema: the struct type that the body was converted to.
        strict: refuse all such fields (`--strict-params`); otherwise refuse only those known to change the response
            and log the others.

    Raises:
        RequestError: a field is refused; the message names it.
    """
    for path, value in _unknown(raw, _type_info(schema), ""):
        if path in IGNORED_FIELDS or value is None or value is False or value in ("", [], {}):
            continue
        shown = path[:64]
        if path == "modalities" and value == ["text"]:
            continue
        if strict or path in REFUSED_FIELDS or path == "modalities":
            raise RequestError(f"{shown!r} is not supported by this server", param=shown)
        logger.warning("ignoring the unknown request field %r", shown)


_type_info = lru_cache(msgspec.inspect.type_info)


def _unknown(raw: Any, kind: msgspec.inspect.Type, path: str) -> Iterator[tuple[str, Any]]:
    """Yield path and value of each field of a body, at any depth, that its type does not define."""
    match kind:
        case msgspec.inspect.UnionType(types=types):
            kind = next((option for option in types if _fits(raw, option)), kind)
            if not isinstance(kind, msgspec.inspect.UnionType):
                yield from _unknown(raw, kind, path)
        case msgspec.inspect.ListType(item_type=item_type) if isinstance(raw, list):
            for index, item in enumerate(raw):
                yield from _unknown(item, item_type, f"{path}{index}.")
        case msgspec.inspect.StructType(fields=fields, tag_field=tag_field) if isinstance(raw, dict):
            known = {field.encode_name: field.type for field in fields}
            for name, value in raw.items():
                if name in known:
                    yield from _unknown(value, known[name], f"{path}{name}.")
                elif name != tag_field:
                    yield f"{path}{name}", value
        case _:
            pass


def _fits(raw: Any, kind: msgspec.inspect.Type) -> bool:
    """Return whether an option of a union is the one that a value was converted to."""
    if isinstance(kind, msgspec.inspect.StructType):
        return isinstance(raw, dict) and (kind.tag_field is None or raw.get(kind.tag_field) == kind.tag)
    return isinstance(kind, msgspec.inspect.ListType) and isinstance(raw, list)


def check_common(body: CommonRequest) -> None:
    """Check the fields that both generation endpoints share and `SamplingParams` does not check.

    Raises:
        RequestError: a field is not valid; the message names the field, its value and the limit.
    """
    check_range("n", body.n, 1, MAX_CHOICES)
    check_range("priority", body.priority, -(2**31), 2**31 - 1)
    if body.cache_salt is not None and len(body.cache_salt) > _MAX_SALT_CHARACTERS:
        raise RequestError(
            f"cache_salt has {len(body.cache_salt)} characters, the limit is {_MAX_SALT_CHARACTERS}", param="cache_salt"
        )
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    if body.user is not None and len(body.user) > 512:
        raise RequestError(f"user has {len(body.user)} characters, the limit is 512", param="user")


def check_range(name: str, value: int | None, low: int, high: int) -> None:
    """Raise RequestError unless the value is unset or in [low, high]."""
    if value is not None and not low <= value <= high:
        raise RequestError(f"{name} must be between {low} and {high}, got {value}", param=name)


def read_logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    """Return biases by token id; the ids are checked against the vocabulary later."""
    result: dict[int, float] = {}
    for key, value in bias.items():
        # isdecimal alone would accept digits of other scripts.
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError(f"logit_bias keys are token ids, got {key!r}", param="logit_bias")
        if not math.isfinite(value):
            raise RequestError(
                f"logit_bias of token {key} must be between -100 and 100, got {value}", param="logit_bias"
            )
        result[int(key)] = value
    return result


def read_stops(stop: str | list[str] | None) -> tuple[str, ...]:
    """Return the stop strings."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > _MAX_STOPS:
        raise RequestError(f"{len(stops)} stop strings, the limit is {_MAX_STOPS}", param="stop")
    for text in stops:
        if not 1 <= len(text) <= _MAX_STOP_CHARACTERS:
            raise RequestError(
                f"stop strings have 1 to {_MAX_STOP_CHARACTERS} characters, got {len(text)}", param="stop"
            )
    return stops
