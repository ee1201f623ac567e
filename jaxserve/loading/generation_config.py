"""`generation_config.json`: a model's own sampling defaults and end tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.huggingface import read_json
from jaxserve.errors import LaunchError, RequestError
from jaxserve.sampling_params import SAMPLING_FIELDS, SamplingParams

_FROM_MODEL = tuple(field.name for field in SAMPLING_FIELDS if field.from_model)


@dataclass(frozen=True)
class GenerationConfig:
    """What a model's makers recommend.

    Attributes:
        sampling: fields of `SamplingParams`, for chats that do not set them.
        eos_token_ids: end tokens besides those of config and tokenizer.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict[str, Any])
    eos_token_ids: tuple[int, ...] = ()


def read_generation_config(model: Path) -> GenerationConfig:
    """The defaults of a model folder; none if it has no such file.

    Raises:
        LaunchError: the file is there and its values are not valid.
    """
    file = model / "generation_config.json"
    if not (model.is_dir() and file.exists()):
        return GenerationConfig()
    try:
        return parse_generation_config(read_json(file))
    except (RequestError, TypeError, ValueError) as error:
        raise LaunchError(f"{file}: {error}") from None


def parse_generation_config(values: Mapping[str, Any]) -> GenerationConfig:
    """The part that is used here. `top_k` 0 means all.

    Raises:
        RequestError, TypeError, ValueError: a value is out of range or no number.
    """
    sampling = {name: values[name] for name in _FROM_MODEL if values.get(name) is not None}
    if sampling.get("top_k") == 0:
        sampling["top_k"] = -1
    SamplingParams(**sampling)
    eos = values.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return GenerationConfig(sampling, tuple(int(token_id) for token_id in ids))
