"""The adapter that a request gets, for every way of naming it, and the errors for names that do not exist."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from api.app import create_app
from jaxserve.config import LoraConfig
from tests.api.conftest import make_server
from tests.support.fakes import FakeEngineClient
from tests.support.tiny import VOCAB_SIZE

MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(VOCAB_SIZE, adapters=("poet", "pirate"))


@pytest.fixture
async def http(engine: FakeEngineClient) -> AsyncIterator[AsyncTestClient[Litestar]]:
    server = make_server(engine, lora=LoraConfig(paths={"poet": "/adapters/poet", "pirate": "org/pirate"}))
    async with AsyncTestClient(create_app(server)) as client:
        yield client


@pytest.mark.parametrize(
    ("fields", "adapter"),
    [
        ({}, ""),
        ({"model": "tiny"}, ""),
        ({"model": "default"}, ""),
        ({"model": "poet"}, "poet"),
        ({"model": "tiny:poet"}, "poet"),
        ({"model": " tiny : poet "}, "poet"),
        ({"model": "tiny:"}, ""),
        ({"model": "/models/tiny:pirate"}, "pirate"),
        ({"lora_path": "pirate"}, "pirate"),
        ({"lora_path": None}, ""),
        ({"lora_path": ""}, ""),
        ({"model": "tiny:poet", "lora_path": "pirate"}, "poet"),
        ({"model": "tiny", "lora_path": "pirate"}, "pirate"),
    ],
)
async def test_names(http: AsyncTestClient[Litestar], engine: FakeEngineClient, fields: Any, adapter: str) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "x"}),
    ):
        answer = await http.post(path, json=body | {"max_tokens": 1} | fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == (fields.get("model") or "tiny")
        assert engine.submitted[-1].adapter_key == adapter


async def test_one_adapter_for_each_prompt(http: AsyncTestClient[Litestar], engine: FakeEngineClient) -> None:
    body = {"prompt": ["a", "b", "c"], "lora_path": ["poet", None, "pirate"], "max_tokens": 1}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert [request.adapter_key for request in engine.submitted] == ["poet", "", "pirate"]


@pytest.mark.parametrize(
    ("path", "fields", "status", "message"),
    [
        ("completions", {"model": "tiny:sailor"}, 404, "the adapter 'sailor' does not exist; loaded: poet, pirate"),
        ("completions", {"lora_path": "sailor"}, 404, "the adapter 'sailor' does not exist"),
        ("completions", {"model": "sailor"}, 404, "the model 'sailor' does not exist; served: tiny; adapters: poet"),
        ("completions", {"model": "other:poet"}, 404, "the model 'other:poet' does not exist"),
        ("completions", {"lora_path": ["poet", "poet"]}, 400, "lora_path has 2 entries for 1 prompts"),
        ("chat/completions", {"lora_path": ["poet"]}, 400, "lora_path must be a single adapter name for this endpoint"),
    ],
)
async def test_what_is_refused(
    http: AsyncTestClient[Litestar], path: str, fields: Any, status: int, message: str
) -> None:
    body = {"messages": MESSAGES} if "chat" in path else {"prompt": "x"}
    answer = await http.post(f"/v1/{path}", json=body | fields)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("fields", [{"model": "tiny:poet"}, {"lora_path": "poet"}])
async def test_a_server_without_lora_says_so(fields: Any) -> None:
    async with AsyncTestClient(create_app(make_server(FakeEngineClient(VOCAB_SIZE)))) as http:
        answer = await http.post("/v1/completions", json={"prompt": "x"} | fields)
    assert answer.status_code == 400
    assert "needs a server with --enable-lora or --lora-paths" in answer.json()["error"]["message"]


async def test_cards(http: AsyncTestClient[Litestar]) -> None:
    cards = (await http.get("/v1/models")).json()["data"]
    assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
        ("tiny", "/models/tiny", None),
        ("poet", "/adapters/poet", "tiny"),
        ("pirate", "org/pirate", "tiny"),
    ]
    assert (await http.get("/v1/models/poet")).json()["parent"] == "tiny"
    assert (await http.get("/v1/models/sailor")).status_code == 404
