"""The sources of sampling parameters that a request does not set: the model's files, and flags."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from jaxserve.errors import LaunchError
from jaxserve.loading.generation_config import (
    GenerationConfig,
    find_generation_config,
    parse_generation_config,
    read_generation_config,
)

RECOMMENDED = {"temperature": 0.6, "top_p": 0.95, "eos_token_id": 7}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "generation_config.json").write_text(json.dumps(RECOMMENDED))
    return tmp_path


@pytest.mark.parametrize("text", ['{"temperature": -1}', '{"top_p": "x"}', "{", '{"eos_token_id": "x"}'])
def test_bad_generation_defaults_are_reported_at_launch(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(LaunchError, match=r"generation_config\.json"):
        read_generation_config(tmp_path)


def test_generation_defaults_of_hugging_face() -> None:
    values = {"top_k": 0, "temperature": 0.6, "do_sample": True, "eos_token_id": [1, 2]}
    assert parse_generation_config(values) == GenerationConfig({"top_k": -1, "temperature": 0.6}, (1, 2))


def test_a_folder_without_one_has_no_defaults(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == GenerationConfig()


def test_gguf_keys(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_float32("general.sampling.temp", 0.25)
    writer.add_uint32("general.sampling.top_k", 40)
    writer.add_float32("general.sampling.penalty_repeat", 1.5)
    writer.add_uint32("general.sampling.mirostat", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_generation_config(tmp_path / "x.gguf") == GenerationConfig(
        {"temperature": 0.25, "top_k": 40, "repetition_penalty": 1.5}
    )


@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("x", {}, {"temperature": 0.6, "top_p": 0.95}),
        ("x", {"defaults": "openai"}, {}),
        ("x", {"preferred": {"temperature": 0.1}}, {"temperature": 0.1, "top_p": 0.95}),
        ("x", {"defaults": "openai", "preferred": {"top_k": 3}}, {"top_k": 3}),
        ("demo", {}, {"temperature": 0.05, "top_p": 0.5}),
        ("demo", {"defaults": "openai"}, {}),
    ],
)
def test_generation_config_source_precedence(model: Path, name: str, options: Any, want: dict[str, Any]) -> None:
    """The end tokens are the model's, whichever sampling defaults are used."""
    assert find_generation_config(name, model, **options) == GenerationConfig(want, (7,))


@pytest.mark.parametrize(
    ("preferred", "message"),
    [
        ({"temperature": -1}, "--preferred-sampling-params: temperature"),
        ({"seed": 3}, "--preferred-sampling-params: unknown parameter 'seed'; known: "),
        ({"temperature": "hot"}, "--preferred-sampling-params: "),
    ],
)
def test_preferred_parameters_that_are_not_valid(model: Path, preferred: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        find_generation_config("x", model, preferred=preferred)
