"""Hostile and mistaken input gets the right status and OpenAI's error object, and the server continues."""

from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from api.app import create_app
from api.server import Server
from tests.api.conftest import make_server
from tests.support.fakes import FakeEngineClient
from tests.support.tiny import VOCAB_SIZE

Http = AsyncTestClient[Litestar]
MESSAGES = [{"role": "user", "content": "x"}]

BAD_COMMON: list[tuple[str, Any]] = [
    *[("temperature", value) for value in (-0.1, 101, "NaN", "x", [])],
    *[("top_p", value) for value in (0, -1, 1.1)],
    *[("top_k", value) for value in (0, -2, 2**31, 1.5)],
    *[("min_p", value) for value in (-0.1, 1.1)],
    *[("frequency_penalty", value) for value in (-2.1, 2.1)],
    *[("presence_penalty", value) for value in (-2.1, 2.1)],
    *[("repetition_penalty", value) for value in (0, -1, 2.1)],
    *[("n", value) for value in (-1, 129, 10**6, 2**31, 2**70)],
    *[("max_tokens", value) for value in (-1, 2**31, 2**70, 1.5, 513)],
    ("min_tokens", -1),
    *[("seed", value) for value in (2**63, -(2**63) - 1, 2**70)],
    ("stop", [""]),
    ("stop", ["x"] * 17),
    ("stop", "x" * 257),
    *[("stop_token_ids", [value]) for value in (-1, VOCAB_SIZE, 2**31, 2**40 + 5)],
    *[
        ("logit_bias", bias)
        for bias in ({"5": 101}, {"5": -100.5}, {"x": 1}, {"-1": 1}, {str(VOCAB_SIZE): 1}, {"٣": 1})
    ],
    ("logit_bias", {str(i): 1 for i in range(1025)}),
    ("stream_options", {"include_usage": True}),
    ("stream_options", {"unknown": True}),
    ("user", "x" * 513),
    ("model", "gpt-4"),
]
BAD_CHAT: list[tuple[str, Any]] = [
    *BAD_COMMON,
    ("messages", []),
    ("messages", "x"),
    ("messages", [{"role": "nobody", "content": "x"}]),
    ("messages", [{"role": "user", "content": None}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
    ("messages", [{"role": "user", "content": "x"}] * 2049),
    ("messages", [{"role": "user", "content": "x" * 600}]),
    ("top_logprobs", 5),
    ("continue_final_message", True),
    *[("chat_template_kwargs", {name: True}) for name in ("tokenize", "chat_template", "add_generation_prompt")],
]
BAD_COMPLETIONS: list[tuple[str, Any]] = [
    *BAD_COMMON,
    *[("prompt", prompt) for prompt in ("", [], [""], [[]], None, 5, ["a", 5], [[["a"]]], ["a"] * 129)],
    *[("prompt", [token]) for token in (-1, VOCAB_SIZE, 2**31, 2**40 + 5)],
    ("prompt", "x" * 600),
    ("prompt", "x" * 100_000),
    *[("logprobs", value) for value in (-1, 21)],
    *[("best_of", value) for value in (0, 129, 10**6)],
]


def check_error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(("field", "value"), BAD_CHAT, ids=lambda value: str(value)[:40])
async def test_chat_names_the_field(http: Http, field: str, value: Any) -> None:
    response = await http.post("/v1/chat/completions", json={"messages": MESSAGES, field: value})
    error = check_error(response, 404 if field == "model" else 400)
    assert field.split("_", maxsplit=1)[0] in (error["param"] or "") + error["message"]


@pytest.mark.parametrize(("field", "value"), BAD_COMPLETIONS, ids=lambda value: str(value)[:40])
async def test_completions_names_the_field(http: Http, field: str, value: Any) -> None:
    response = await http.post("/v1/completions", json={"prompt": "x", field: value})
    error = check_error(response, 404 if field == "model" else 400)
    assert field.split("_", maxsplit=1)[0] in (error["param"] or "") + error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'"x"', b"{", b'{"prompt": "x"} trailing', b'{"prompt": "\xff"}', b'{"prompt": NaN}',
     b"[" * 100_000, b'{"a":' * 50_000, b'\xef\xbb\xbf{"prompt": "x"}', b'{"prompt": "\\ud800"}'],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
async def test_bodies_that_are_not_json(http: Http, body: bytes) -> None:
    response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    check_error(response, 400)
    assert (await http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""]
)
async def test_other_content_types(http: Http, kind: str) -> None:
    response = await http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": kind})
    check_error(response, 415)


async def test_a_body_over_the_limit(http: Http) -> None:
    body = b'{"prompt": "' + b"x" * (8 << 20) + b'"}'
    check_error(await http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 413)


async def test_unknown_routes_and_methods(http: Http) -> None:
    check_error(await http.get("/v1/nothing"), 404)
    check_error(await http.get("/v1/completions"), 405)
    check_error(await http.get("/v1/models/other"), 404)


async def test_a_full_queue(engine: FakeEngineClient) -> None:
    engine._max_live = 0
    async with AsyncTestClient(create_app(make_server(engine))) as http:
        for stream in (False, True):
            response = await http.post("/v1/completions", json={"prompt": ["a", "b"], "stream": stream})
            check_error(response, 429)
            assert response.headers["retry-after"] == "1"
    assert engine.num_live == 0


async def test_draining(http: Http, server: Server) -> None:
    server.draining = True
    response = await http.post("/v1/completions", json={"prompt": "x"})
    check_error(response, 503)
    assert int(response.headers["retry-after"]) > 0
    assert (await http.get("/health")).status_code == 503
    assert (await http.get("/live")).status_code == 200


async def test_internal_errors_tell_nothing(http: Http, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise ZeroDivisionError("/secret/path")

    monkeypatch.setattr(server, "check_grammar", explode)
    error = check_error(await http.post("/v1/completions", json={"prompt": "x"}), 500)
    assert "secret" not in error["message"]
    assert "ZeroDivision" not in error["message"]


@pytest.mark.parametrize(("field", "value"), [("functions", [{"name": "f"}]), ("modalities", ["audio"])])
async def test_fields_that_cannot_be_honoured_are_refused(http: Http, field: str, value: Any) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        body = {"messages": MESSAGES} if "chat" in path else {"prompt": "x"}
        error = check_error(await http.post(path, json={**body, field: value}), 400)
        assert error["param"] == field
        assert (await http.post(path, json={**body, field: None, "metadata": {"a": "b"}})).status_code == 200


async def test_unknown_fields_are_logged_or_refused(http: Http, caplog: pytest.LogCaptureFixture) -> None:
    body = {"messages": MESSAGES, "nonsense": 1}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert "nonsense" in caplog.text
    strict = make_server(FakeEngineClient(VOCAB_SIZE), strict_params=True)
    async with AsyncTestClient(create_app(strict)) as client:
        assert check_error(await client.post("/v1/chat/completions", json=body), 400)["param"] == "nonsense"
        assert (await client.post("/v1/chat/completions", json={"messages": MESSAGES, "user": "me"})).status_code == 200
        for fields, param in (
            ({"messages": [{**MESSAGES[0], "mood": "good"}]}, "messages.0.mood"),
            ({"response_format": {"type": "text", "more": 1}}, "response_format.more"),
        ):
            response = await client.post("/v1/chat/completions", json={**body, "nonsense": None, **fields})
            assert check_error(response, 400)["param"] == param
