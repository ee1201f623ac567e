"""Routes other than generation, over a fake engine: models, tokenizer, information, control, metrics, keys, OpenAPI."""

import json

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from api.app import create_app
from tests.api.conftest import make_server
from tests.support.fakes import FakeEngineClient
from tests.support.tiny import BOS, START, VOCAB_SIZE

Http = AsyncTestClient[Litestar]
KEY = {"authorization": "Bearer sésame"}


async def test_models(http: Http) -> None:
    [card] = (await http.get("/v1/models")).json()["data"]
    assert card["id"] == "tiny"
    assert card["max_model_len"] == 512
    assert (await http.get("/v1/models/tiny")).json() == card


async def test_tokenize_and_back(http: Http) -> None:
    answer = (await http.post("/tokenize", json={"prompt": "hé"})).json()
    assert answer == {"tokens": [104, 0xC3, 0xA9], "count": 3, "max_model_len": 512}
    assert (await http.post("/detokenize", json={"tokens": answer["tokens"]})).json() == {"text": "hé"}
    chat = (await http.post("/v1/tokenize", json={"messages": [{"role": "user", "content": "x"}]})).json()
    assert chat["tokens"][:2] == [BOS, START]
    assert (await http.post("/tokenize", json={})).status_code == 400
    assert (await http.post("/detokenize", json={"tokens": [VOCAB_SIZE]})).status_code == 400


async def test_information(http: Http) -> None:
    info = (await http.get("/get_model_info")).json()
    assert info["model_path"] == "/models/tiny"
    assert (await http.get("/get_server_info")).json()["max_total_num_tokens"] == 16 * 256


async def test_health_generate(http: Http) -> None:
    assert (await http.get("/health_generate")).status_code == 200


@pytest.mark.parametrize(
    ("keys", "sent", "statuses"),
    [
        ({}, None, (200, 200)),
        ({"api_key": "user"}, None, (401, 401)),
        ({"api_key": "user"}, "user", (200, 200)),
        ({"admin_api_key": "admin"}, None, (200, 401)),
        ({"admin_api_key": "admin"}, "admin", (200, 200)),
        ({"api_key": "user", "admin_api_key": "admin"}, None, (401, 401)),
        ({"api_key": "user", "admin_api_key": "admin"}, "other", (401, 401)),
        ({"api_key": "user", "admin_api_key": "admin"}, "user", (200, 403)),
        ({"api_key": "user", "admin_api_key": "admin"}, "admin", (200, 200)),
    ],
)
async def test_control_routes_want_the_admins_key_where_there_is_one(
    engine: FakeEngineClient, keys: dict[str, str], sent: str | None, statuses: tuple[int, int]
) -> None:
    headers = {} if sent is None else {"authorization": f"Bearer {sent}"}
    async with AsyncTestClient(create_app(make_server(engine, **keys))) as http:
        assert (await http.get("/v1/models", headers=headers)).status_code == statuses[0]
        for path, body in (
            ("/flush_cache", {}),
            ("/abort_request", {"rid": "x"}),
            ("/load_lora_adapter", {"lora_name": "a", "lora_path": "a"}),
            ("/unload_lora_adapter", {"lora_name": "a"}),
        ):
            answer = await http.post(path, json=body, headers=headers)
            assert answer.status_code == (400 if "lora" in path and statuses[1] == 200 else statuses[1])


async def test_flush_and_abort(http: Http) -> None:
    assert (await http.post("/flush_cache", json={})).json() == {"flushed": True}
    assert (await http.post("/abort_request", json={"abort_all": True})).json() == {"aborted": 0}
    assert (await http.post("/abort_request", json={})).status_code == 400


async def test_metrics_count_tokens(http: Http) -> None:
    await http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5})
    text = (await http.get("/metrics")).text
    for line in (
        "jaxserve_prompt_tokens_total 3.0",
        "jaxserve_output_tokens_total 5.0",
        "jaxserve_pages 256.0",
        'jaxserve_requests_total{endpoint="completions"} 1.0',
        "jaxserve_compiles_after_ready_total 0.0",
        "jaxserve_time_to_first_token_seconds_count 1.0",
        "jaxserve_inter_token_latency_seconds_count 4.0",
    ):
        assert line in text, line


async def test_no_series_per_model_name(http: Http) -> None:
    before = (await http.get("/metrics")).text.count("\n")
    for name in range(50):
        await http.post("/v1/completions", json={"prompt": "x", "model": f"model-{name}"})
    assert (await http.get("/metrics")).text.count("\n") == before


OPEN_ROUTES = {"/health", "/ready", "/live", "/health_generate", "/metrics"}


async def test_every_other_route_wants_the_key(engine: FakeEngineClient) -> None:
    app = create_app(make_server(engine, api_key="sésame"))
    async with AsyncTestClient(app) as http:
        paths = {path for route in app.routes for path in [route.path] if "{" not in path}
        assert paths >= OPEN_ROUTES | {"/v1/chat/completions", "/schema/openapi.json"}
        for path in sorted(paths):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sésame".encode()}):
                responses = [await http.get(path, headers=headers), await http.post(path, json={}, headers=headers)]
                allowed = {405} if path not in OPEN_ROUTES else {200, 405}
                assert {response.status_code for response in responses} <= allowed | {401}, path
                assert path in OPEN_ROUTES or 401 in {response.status_code for response in responses}, path
        headers = {"authorization": "Bearer sésame".encode()}
        assert (await http.get("/v1/models", headers=headers)).status_code == 200


async def test_key_over_the_wire_in_any_script(engine: FakeEngineClient) -> None:
    async with AsyncTestClient(create_app(make_server(engine, api_key="k"))) as http:
        for value in (b"Bearer \xff\xfe", b"Bearer " + b"k" * 10_000, b"Basic k", b"Bearer", b""):
            response = await http.get("/v1/models", headers={"authorization": value})
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"


async def test_openapi_describes_the_bodies(http: Http) -> None:
    document = (await http.get("/schema/openapi.json")).json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rsplit("/", 1)[1]]
    assert schema["required"] == ["messages"]
    assert {"temperature", "logit_bias", "stream_options"} <= set(schema["properties"])
    assert json.dumps(document)


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_unavailable_without_an_engine(http: Http, engine: FakeEngineClient, path: str) -> None:
    assert (await http.get(path)).status_code == 200
    engine.lost = "gone"
    response = await http.get(path)
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "gone"
