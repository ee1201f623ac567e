"""The server as users meet it: the OpenAI client, many concurrent clients, and clients that disconnect."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.e2e.conftest import ServerProcess

MESSAGES: Any = [{"role": "user", "content": "Tell me about JAX."}]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def metric(server: ServerProcess, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def wait_for(server: ServerProcess, name: str, value: float, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while metric(server, name) != value:
        assert time.monotonic() < deadline, f"{name} is {metric(server, name)} after {limit_s} s"
        time.sleep(0.02)


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_chat_whole_equals_streamed(client: OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(**options)
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 40
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completions_with_everything(client: OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["one", "two"], max_tokens=12, n=2, best_of=3, logprobs=3, echo=True, seed=7,
        temperature=0.9, top_p=0.9, frequency_penalty=0.5, presence_penalty=0.5, logit_bias={"65": 5, "66": -100},
        stop=["zzz"], extra_body={"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 3},
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        assert choice.text.startswith(("one", "two"))
        assert choice.logprobs is not None
        assert "B" not in choice.text


def test_seeds_reproduce_alone_and_in_company(client: OpenAI) -> None:
    def ask(seed: int, n: int = 1) -> list[str]:
        answer = client.completions.create(model="tiny", prompt="abc", max_tokens=24, temperature=1.0, seed=seed, n=n)
        return [choice.text for choice in answer.choices]

    alone = ask(1)
    assert ask(1) == alone
    assert ask(2) != alone
    several = ask(1, n=3)
    assert several[0] == alone[0]
    assert len(set(several)) == 3


def test_logit_bias_forces_and_forbids(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=5, logit_bias={"65": 100}, temperature=0)
    assert answer.choices[0].text == "AAAAA"


async def test_many_clients_at_once(server: ServerProcess) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def ask(index: int) -> str:
            options: Any = {"model": "tiny", "prompt": f"client {index}", "max_tokens": 20, "seed": index}
            if index % 2:
                stream = await client.completions.create(**options, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])
            return (await client.completions.create(**options)).choices[0].text

        together = await asyncio.gather(*(ask(index) for index in range(24)))
        alone = [await ask(index) for index in range(0, 24, 6)]
    # Sampling never depends on other rows; float32 logits differ only by rounding, which changes no token here.
    assert alone == together[::6]
    assert metric(server, "jaxserve_compiles_after_ready_total") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_frees_its_row(server: ServerProcess, stream: bool) -> None:
    body = {"prompt": "x" * 100, "max_tokens": 400, "ignore_eos": True, "stream": stream}
    with httpx.Client() as http:
        try:
            with http.stream("POST", f"{server.url}/v1/completions", json=body, timeout=0.3 if not stream else 30) as r:
                next(r.iter_lines())
        except httpx.ReadTimeout:
            pass
    wait_for(server, "jaxserve_running_requests", 0, 1.0)
    assert metric(server, "jaxserve_used_pages") == 0


def test_errors_reach_the_client_as_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="exceed the limit of running and queued choices"):
        client.completions.create(model="tiny", prompt="x", n=100)
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model="tiny", prompt="x" * 600)


def test_a_prefix_is_computed_once(client: OpenAI) -> None:
    prompt = "The same beginning for everyone. " * 8
    client.completions.create(model="tiny", prompt=prompt + "first", max_tokens=1)
    answer = client.completions.create(model="tiny", prompt=prompt + "second", max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == len(prompt) // 16 * 16


def test_abort_by_the_clients_own_id(server: ServerProcess, client: OpenAI) -> None:
    """One id stands for two prompts: all their choices end as aborted, and the rows are free."""
    options: Any = {"model": "tiny", "prompt": ["one", "two"], "n": 8, "max_tokens": 400, "stream": True}
    stream = client.completions.create(**options, extra_body={"rid": "mine", "ignore_eos": True})
    reasons: dict[int, str] = {}
    aborted = None
    for chunk in stream:
        assert chunk.id == "mine"
        if aborted is None:
            # The engine must not finish before the abort reaches it.
            os.kill(server.engine_pid(), signal.SIGSTOP)
            aborted = httpx.post(f"{server.url}/abort_request", json={"rid": "mine"}).json()
            os.kill(server.engine_pid(), signal.SIGCONT)
        if chunk.choices[0].finish_reason is not None:
            reasons[chunk.choices[0].index] = chunk.choices[0].finish_reason
    assert aborted == {"aborted": 1}
    assert reasons == dict.fromkeys(range(16), "abort")
    assert metric(server, "jaxserve_running_requests") == 0


def test_a_client_that_does_not_read_holds_up_nobody(server: ServerProcess, client: OpenAI) -> None:
    """The whole answer waits for the slow client, while others are served."""
    body = {"prompt": "x", "max_tokens": 500, "n": 8, "ignore_eos": True, "stream": True, "logprobs": 20}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as slow:
        for _ in range(3):
            client.completions.create(model="tiny", prompt="quick", max_tokens=5)
        wait_for(server, "jaxserve_running_requests", 0, 30)
        lines = [line for line in slow.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert sum('"finish_reason":"length"' in line for line in lines) == 8


def test_a_head_too_large_is_refused(server: ServerProcess) -> None:
    response = httpx.get(f"{server.url}/v1/models", headers={"x-large": "x" * 70_000})
    assert response.status_code == 431
    assert response.json()["error"]["type"] == "invalid_request_error"
