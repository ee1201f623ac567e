"""A model's own sampling defaults and end tokens: `generation_config.json`, or a GGUF file's `general.sampling.*`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from checkpoints.gguf import read_values
from checkpoints.huggingface import read_json
from checkpoints.source import CheckpointError
from jaxserve.errors import LaunchError, RequestError
from jaxserve.sampling_params import SAMPLING_FIELDS, SamplingParams

SamplingDefaults = Literal["model", "openai"]

_FROM_MODEL = tuple(field.name for field in SAMPLING_FIELDS if field.from_model)
_GGUF_KEYS: Mapping[str, str] = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
# The demo model's authors recommend temperature 0.2 and top-p 0.9, but its 4-bit weights give flatter distributions
# than theirs: with those settings, only half of the answers to the README's question name Paris.
_DEMO_SAMPLING: Mapping[str, Any] = {"temperature": 0.05, "top_p": 0.5}


@dataclass(frozen=True)
class GenerationConfig:
    """A model's recommended sampling defaults and end tokens.

    Attributes:
        sampling: fields of `SamplingParams` for requests that do not set them.
        eos_token_ids: end tokens besides those of config and tokenizer.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict[str, Any])
    eos_token_ids: tuple[int, ...] = ()


def find_generation_config(
    name: str, path: Path, *, defaults: SamplingDefaults = "model", preferred: Mapping[str, Any] | None = None
) -> GenerationConfig:
    """Return the defaults of a model, overridden by the user's own.

    Args:
        name: the model as the user named it; `demo` has defaults of its own.
        path: its folder or file.
        defaults: `openai` ignores the model's recommended sampling parameters.
        preferred: the user's own defaults, `--preferred-sampling-params`.

    Raises:
        LaunchError: a parameter is unknown, or a value is not valid.
    """
    config = read_generation_config(path)
    own = dict(preferred or {})
    if unknown := sorted(own.keys() - set(_FROM_MODEL)):
        raise LaunchError(
            f"--preferred-sampling-params: unknown parameter {unknown[0]!r}; known: {', '.join(_FROM_MODEL)}"
        )
    sampling = {**config.sampling, **(_DEMO_SAMPLING if name == "demo" else {})} if defaults == "model" else {}
    try:
        sampling |= parse_generation_config(own).sampling
    except (RequestError, TypeError, ValueError) as error:
        raise LaunchError(f"--preferred-sampling-params: {error}") from None
    return GenerationConfig(sampling, config.eos_token_ids)


def read_generation_config(path: Path) -> GenerationConfig:
    """Read the defaults of a model folder or a `.gguf` file; empty if it has none.

    Raises:
        LaunchError: the file cannot be read, or a value is not valid.
    """
    try:
        if path.suffix == ".gguf":
            values = read_values(path, _GGUF_KEYS)
            return parse_generation_config({_GGUF_KEYS[key]: value for key, value in values.items()})
        path /= "generation_config.json"
        return parse_generation_config(read_json(path)) if path.exists() else GenerationConfig()
    except (CheckpointError, RequestError, TypeError, ValueError) as error:
        raise LaunchError(f"{path}: {error}") from None


def parse_generation_config(values: Mapping[str, Any]) -> GenerationConfig:
    """Return the supported part of a generation config. `top_k` 0 means no limit.

    Raises:
        RequestError, TypeError, ValueError: a value is out of range or not a number.
    """
    sampling = {name: values[name] for name in _FROM_MODEL if values.get(name) is not None}
    if sampling.get("top_k") == 0:
        sampling["top_k"] = -1
    SamplingParams(**sampling)
    eos = values.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return GenerationConfig(sampling, tuple(int(token_id) for token_id in ids))
