"""The README's first promise: one command serves a real model that gives sensible answers."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.e2e.conftest import ServerProcess

pytestmark = pytest.mark.demo


def test_the_demo_knows_a_capital(demo: ServerProcess) -> None:
    with OpenAI(base_url=f"{demo.url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0
        )
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 37


def test_defaults_name_the_capital_and_end(demo: ServerProcess) -> None:
    """The README's question is asked with the sampling parameters that the demo model recommends, and 16 seeds."""

    def ask(seed: int) -> tuple[bool, str]:
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "What is the capital of France?"}], seed=seed
        )
        [choice] = answer.choices
        return "Paris" in (choice.message.content or ""), choice.finish_reason

    with OpenAI(base_url=f"{demo.url}/v1", api_key="none") as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(16)))
    assert sum(named for named, _ in answers) >= 15
    assert {reason for _, reason in answers} == {"stop"}


def test_a_long_prefix_is_computed_once_and_changes_nothing(demo: ServerProcess) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 100
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
    first, second = (httpx.post(f"{demo.url}/v1/completions", json=body, timeout=120).json() for _ in range(2))
    assert second["choices"] == first["choices"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 960


def test_memory_stays_modest(demo: ServerProcess) -> None:
    def resident_mb(pid: int) -> float:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no Pss line")

    assert resident_mb(demo.process.pid) + resident_mb(demo.engine_pid()) < 2000
