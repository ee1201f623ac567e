"""Chat and completions over a fake engine that counts upwards: it continues `abc` with `def`."""

import json
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from api.app import create_app
from api.server import Server
from jaxserve.loading.generation_config import GenerationConfig
from tests.api.conftest import make_server
from tests.support.fakes import FakeEngineClient

Http = AsyncTestClient[Litestar]
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def events(text: str) -> list[Any]:
    """Return the payloads of an event stream; `[DONE]` stays a string."""
    blocks = text.strip().split("\n\n")
    assert all(block.startswith("data: ") for block in blocks)
    payloads = [block.removeprefix("data: ") for block in blocks]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


async def complete(http: Http, **body: Any) -> dict[str, Any]:
    response = await http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def test_completion(http: Http) -> None:
    answer = await complete(http)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    choice = {"index": 0, "text": "defg", "finish_reason": "length", "logprobs": None, "matched_stop": None}
    assert answer["choices"] == [choice]
    assert answer["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip


async def test_prompts_of_every_kind(http: Http) -> None:
    for prompt in ("abc", ["abc"], [97, 98, 99], [[97, 98, 99]]):
        assert (await complete(http, prompt=prompt))["choices"][0]["text"] == "defg"


async def test_choices_are_numbered_prompt_major(http: Http) -> None:
    answer = await complete(http, prompt=["abc", "ABC"], n=2)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "defg"), (1, "defg"), (2, "DEFG"), (3, "DEFG")]
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 16


async def test_default_of_sixteen_tokens(http: Http) -> None:
    answer = await complete(http, max_tokens=None)
    assert answer["choices"][0]["text"] == "defghijklmnopqrs"


async def test_stop_string_is_cut_and_named(http: Http) -> None:
    answer = await complete(http, max_tokens=20, stop=["hi", "zz"])
    assert answer["choices"][0] == {
        "index": 0, "text": "defg", "finish_reason": "stop", "logprobs": None, "matched_stop": "hi",
    }  # fmt: skip
    kept = await complete(http, max_tokens=20, stop="hi", no_stop_trim=True)
    assert kept["choices"][0]["text"] == "defghi"


async def test_stop_token(http: Http) -> None:
    answer = await complete(http, max_tokens=20, stop_token_ids=[ord("g")])
    assert answer["choices"][0]["text"] == "def"
    assert answer["choices"][0]["matched_stop"] == ord("g")
    ignored = await complete(http, max_tokens=6, stop_token_ids=[ord("g")], ignore_eos=True)
    assert ignored["choices"][0]["text"] == "defghi"


async def test_echo_with_logprobs_and_offsets(http: Http) -> None:
    answer = await complete(http, prompt="aé", max_tokens=2, echo=True, logprobs=2)
    choice = answer["choices"][0]
    assert choice["text"].startswith("aé")
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -0.5, -0.5]
    assert logprobs["text_offset"][:3] == [0, 1, 1]
    assert len(logprobs["top_logprobs"]) == 5
    assert logprobs["top_logprobs"][0] is None


async def test_echo_of_the_prompt_alone(http: Http) -> None:
    answer = await complete(http, max_tokens=0, echo=True, logprobs=1)
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
    assert answer["usage"]["completion_tokens"] == 0


async def test_best_of_returns_n(http: Http) -> None:
    answer = await complete(http, n=1, best_of=3)
    assert len(answer["choices"]) == 1
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 12


async def test_completion_stream(http: Http) -> None:
    body = {"prompt": "abc", "max_tokens": 3, "stream": True, "echo": True, "stream_options": {"include_usage": True}}
    response = await http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcdef"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 6
    assert done == "[DONE]"


async def test_chat(http: Http) -> None:
    response = await http.post("/v1/chat/completions", json=CHAT)
    answer = response.json()
    assert answer["object"] == "chat.completion"
    # The prompt ends in a newline, byte 10.
    assert answer["choices"][0]["message"]["content"] == "\x0b\x0c\r\x0e"
    assert answer["choices"][0]["message"]["reasoning_content"] is None
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_chat_stream_order(http: Http) -> None:
    body = {**CHAT, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events((await http.post("/v1/chat/completions", json=body)).text)
    assert chunks.pop() == "[DONE]"
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    flat = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in flat[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert [(c["index"], c["finish_reason"], c["delta"]) for c in flat[-2:]] == [(0, "length", {}), (1, "length", {})]
    for index in (0, 1):
        assert "".join(c["delta"].get("content", "") for c in flat if c["index"] == index) == "\x0b\x0c\r\x0e"
    assert all("usage" not in chunk for chunk in chunks)


async def test_continuous_usage(http: Http) -> None:
    options = {"continuous_usage_stats": True}
    chunks = events(
        (await http.post("/v1/chat/completions", json={**CHAT, "stream": True, "stream_options": options})).text
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]]
    assert counts == [0, 1, 2, 3, 4, 4]


async def test_chat_logprobs_in_streams_and_whole(http: Http) -> None:
    body = {**CHAT, "logprobs": True, "top_logprobs": 2}
    whole = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]["logprobs"]["content"]
    assert [(entry["bytes"], entry["logprob"]) for entry in whole] == [
        ([11], -0.5),
        ([12], -0.5),
        ([13], -0.5),
        ([14], -0.5),
    ]
    assert all(len(entry["top_logprobs"]) == 2 for entry in whole)
    chunks = events((await http.post("/v1/chat/completions", json={**body, "stream": True})).text)
    streamed = [
        entry for chunk in chunks[:-1] for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == whole


async def test_characters_are_never_cut(http: Http) -> None:
    """The engine emits the bytes C3 C4: C3 alone is no character, and C4 shows that it never becomes one."""
    chunks = events((await http.post("/v1/completions", json={"prompt": [0xC2], "max_tokens": 2, "stream": True})).text)
    texts = [chunk["choices"][0]["text"] for chunk in chunks[:-1]]
    assert "".join(texts) == "\ufffd\ufffd"


async def test_cached_tokens_are_counted(http: Http) -> None:
    prompt = "x" * 40
    await complete(http, prompt=prompt)
    answer = await complete(http, prompt=prompt)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 32
    assert (await complete(http, prompt=prompt, cache_salt="other"))["usage"]["prompt_tokens_details"][
        "cached_tokens"
    ] == 0


async def test_a_row_that_is_not_finite_fails_alone(http: Http, engine: FakeEngineClient) -> None:
    engine.runner.not_finite = {0}
    response = await http.post("/v1/completions", json={"prompt": "abc"})
    assert response.status_code == 500
    assert "numerical_error" in response.json()["error"]["message"]
    engine.runner.not_finite = set()
    assert (await complete(http))["choices"][0]["text"] == "defg"


async def test_a_failed_step_is_computed_again(http: Http, engine: FakeEngineClient) -> None:
    engine.runner.fail_next = 2
    assert (await complete(http))["choices"][0]["text"] == "defg"
    assert engine.runner.num_resets == 2


async def test_an_engine_that_is_lost_ends_what_runs(http: Http, server: Server, engine: FakeEngineClient) -> None:
    """A request without a stream gets a 503; tests/e2e covers streams over a socket."""
    engine.lose_after = 5
    response = await http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 100})
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "service_unavailable_error"
    assert (await http.get("/health")).status_code == 503


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_nothing_stays_behind(http: Http, server: Server, engine: FakeEngineClient, path: str) -> None:
    body = {**CHAT, "prompt": "abc"}
    for stream in (False, True):
        await http.post(path, json={**body, "stream": stream})
    assert server.running == {}
    assert engine.num_live == 0


async def test_the_clients_own_id_comes_back(http: Http) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}),
    ):
        assert (await http.post(path, json={**body, "rid": "mine"})).json()["id"] == "mine"
        for bad in ("", "x" * 257, "a\nb"):
            response = await http.post(path, json={**body, "rid": bad})
            assert response.json()["error"]["param"] == "rid"


async def test_a_long_prompt_is_prepared_off_the_loop(http: Http) -> None:
    """A large body, which a thread prepares, gets the same answer as a small one."""
    messages = [{"role": "system", "content": "x" * 400}, {"role": "user", "content": "y"}]
    body = {"messages": messages, "max_tokens": 3}
    small = (await http.post("/v1/chat/completions", json=body)).json()
    large = (await http.post("/v1/chat/completions", json={**body, "metadata": {"filler": "z" * 20_000}})).json()
    assert small["choices"] == large["choices"]
    refused = await http.post("/v1/completions", json={"prompt": "x" * 20_000})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt"


async def test_an_id_in_use_is_refused_and_free_again_at_the_end(http: Http, server: Server) -> None:
    body = {"prompt": "a", "max_tokens": 2, "stop": "c", "rid": "chatcmpl-1"}
    for _ in range(3):
        answer = (await http.post("/v1/completions", json=body)).json()
        assert answer["choices"][0]["text"] == "b"
        assert answer["choices"][0]["finish_reason"] == "stop"
    server.running["chatcmpl-1"] = []
    refused = await http.post("/v1/completions", json=body)
    assert refused.json()["error"]["param"] == "rid"
    assert (await http.post("/abort_request", json={"rid": "chatcmpl-1"})).json() == {"aborted": 1}
    assert (await http.post("/abort_request", json={"rid": "cmpl-1"})).json() == {"aborted": 0}


async def test_no_prompt_of_a_batch_runs_when_not_all_fit(http: Http, engine: FakeEngineClient) -> None:
    engine._max_live = 3
    response = await http.post("/v1/completions", json={"prompt": ["a"] * 4, "max_tokens": 1})
    assert response.status_code == 429
    assert engine.runner.plans == []


async def test_too_many_ids_to_detokenize(http: Http) -> None:
    assert (await http.post("/detokenize", json={"tokens": [1] * 513})).status_code == 400


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_defaults_are_for_what_a_request_does_not_set(path: str, engine: FakeEngineClient) -> None:
    server = make_server(engine, generation=GenerationConfig({"temperature": 0.3, "top_k": 7}))
    body = {"messages": CHAT["messages"]} if "chat" in path else {"prompt": "abc"}
    async with AsyncTestClient(create_app(server)) as http:
        for own in ({}, {"temperature": 1.5}):
            assert (await http.post(path, json={**body, "max_tokens": 1, **own})).status_code == 200
        info = (await http.get("/get_model_info")).json()
    first, second = (request.sampling for request in engine.submitted)
    assert (first.temperature, first.top_k) == (0.3, 7)
    assert (second.temperature, second.top_k) == (1.5, 7)
    assert info["preferred_sampling_params"] == {"temperature": 0.3, "top_k": 7}
