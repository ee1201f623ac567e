"""Adapters on a real server, merged into the base and next to it."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.e2e.conftest import ServerProcess
from tests.support.tiny import write_adapter


def complete(server: ServerProcess, model: str) -> str:
    body = {"model": model, "prompt": [1, 2, 3], "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_a_merged_adapter_is_served_under_its_name(flags: list[str], server: ServerProcess, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    # The fixture's flags give the base a name.
    unnamed = [flag for flag in flags if flag not in ("--served-model-name", "tiny")]
    merged = ServerProcess(*unnamed, "--merge-lora", f"poet={adapter}", log=tmp_path / "log").wait_ready()
    models = httpx.get(f"{merged.url}/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["poet"]
    assert complete(merged, "poet") != complete(server, "tiny")
    assert merged.stop() == 0


def test_adapters_are_served_beside_the_base(flags: list[str], server: ServerProcess, tmp_path: Path) -> None:
    """More adapters than slots run at the same time, under each of their names, and answer as they do alone."""
    paths = {name: write_adapter(tmp_path / name, seed=seed, rank=2 + seed) for seed, name in enumerate("abc")}
    as_json = json.dumps({"lora_name": "c", "lora_path": str(paths["c"])})
    lora = ["--lora-paths", f"a={paths['a']}", f"b={paths['b']}", as_json, "--max-loras-per-batch", "3"]
    process = ServerProcess(*flags, *lora, log=tmp_path / "log").wait_ready()
    cards = httpx.get(f"{process.url}/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("tiny", None), *((name, "tiny") for name in "abc")]
    models = ["tiny", "a", "tiny:b", "c", "tiny:c"]
    alone = {model: complete(process, model) for model in models}
    assert alone["tiny"] == complete(server, "tiny")
    assert alone["c"] == alone["tiny:c"]
    assert len(set(alone.values())) == 4
    with ThreadPoolExecutor(20) as pool:
        together = pool.map(lambda model: (model, complete(process, model)), models * 8)
        assert all(text == alone[model] for model, text in together)
    chosen: Any = {"lora_path": "b", "ignore_eos": True}
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none") as client:
        answer = client.completions.create(
            model="tiny", prompt=[1, 2, 3], max_tokens=16, temperature=0, extra_body=chosen
        )
    assert answer.choices[0].text == alone["tiny:b"]
    assert "jaxserve_compiles_after_ready_total 0.0" in httpx.get(f"{process.url}/metrics").text
    assert process.stop() == 0
