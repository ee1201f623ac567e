"""Adapters, as a user serves them."""

from pathlib import Path

import httpx

from jaxserve.errors import ExitCode
from tests.e2e.conftest import ServerProcess
from tests.tiny import CONFIG, write_adapter


def complete(server: ServerProcess, model: str) -> str:
    body = {"model": model, "prompt": [1, 2, 3], "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_a_merged_adapter_is_served_under_its_name(flags: list[str], server: ServerProcess, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    # The fixture's flags name the base.
    unnamed = [flag for flag in flags if flag not in ("--served-model-name", "tiny")]
    merged = ServerProcess(*unnamed, "--merge-lora", f"poet={adapter}", log=tmp_path / "log").wait_ready()
    models = httpx.get(f"{merged.url}/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["poet"]
    assert complete(merged, "poet") != complete(server, "tiny")
    assert merged.stop() == 0


def test_an_adapter_of_another_model_is_told_at_the_start(flags: list[str], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", CONFIG | {"hidden_size": 32})
    process = ServerProcess(*flags, "--merge-lora", str(adapter), log=tmp_path / "log")
    assert process.process.wait(60) == ExitCode.BAD_CONFIG
    assert "--merge-lora: the adapter does not fit the model" in process.log.read_text()
