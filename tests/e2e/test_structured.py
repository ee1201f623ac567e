"""Structured outputs of a model with random weights are valid whenever they end by themselves.

This holds for random schemas, and for every grammar combined with every two other features of a request.
"""

import asyncio
import itertools
import json
import random
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import numpy as np
import pytest

from api.server import ApiSettings, Server
from jaxserve.text.tokenizer import load_tokenizer
from tests.e2e.conftest import loaded, serving
from tests.support.marks import slow
from tests.support.schemas import random_schema
from tests.support.tiny import write_checkpoint

NUM_SCHEMAS = 300
CONTEXT = 8192


@pytest.fixture(scope="module")
async def http(tmp_path_factory: pytest.TempPathFactory, compilation_cache: str) -> AsyncIterator[httpx.AsyncClient]:
    folder: Path = write_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=CONTEXT)
    options: Any = {
        "max_running_requests": 32, "chunked_prefill_size": 128, "max_total_tokens": 32 * 1024, "context_length": 1024,
    }  # fmt: skip
    settings = ApiSettings(
        model_path="tiny", served_model_name="tiny", reasoning_parser="qwen3", tool_call_parser="hermes"
    )
    async with (
        loaded(folder, compilation_cache_dir=compilation_cache, **options) as engine,
        serving(Server(settings, engine), load_tokenizer(folder)) as url,
        httpx.AsyncClient(base_url=url, timeout=120) as client,
    ):
        yield client


async def ask(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, **fields}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_random_schemas(http: httpx.AsyncClient) -> None:
    async def one(seed: int) -> bool:
        schema = random_schema(random.Random(seed))
        format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        choice = (await ask(http, response_format=format, seed=seed))["choices"][0]
        if choice["finish_reason"] != "stop":
            assert choice["finish_reason"] == "length"
            return False
        value = json.loads(choice["message"]["content"])
        assert jsonschema_rs.is_valid(schema, value), (seed, schema, value)
        return True

    stopped: list[bool] = []
    for seeds in itertools.batched(range(NUM_SCHEMAS), 32):
        stopped += await asyncio.gather(*map(one, seeds))
    assert sum(stopped) > 0.8 * NUM_SCHEMAS


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}
GRAMMARS: Mapping[str, dict[str, Any]] = {
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True}}},
    "regex": {"regex": "[a-f]{3,6}(-[0-9]{2})?"},
    "ebnf": {"ebnf": 'root ::= ("ab" | "c" [0-9])+ "."'},
    "required": {"tools": [TOOL], "tool_choice": "required"},
    "named": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
}
FEATURES: Mapping[str, dict[str, Any]] = {
    "n": {"n": 3},
    "greedy": {"temperature": 0},
    "sampling": {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "stop": {"stop": ["99", "zz"]},
    "penalties": {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    "bias": {"logit_bias": {"97": 3, "98": -3}},
    "min_tokens": {"min_tokens": 2},
    "ignore_eos": {"ignore_eos": True},
    "budget": {"thinking_budget": 4},
    "single call": {"parallel_tool_calls": False},
}
PAIRS = [(grammar, *pair) for grammar in GRAMMARS for pair in itertools.combinations(FEATURES, 2)]


def check(grammar: str, choice: dict[str, Any]) -> None:
    """Check that a choice that ended by itself conforms to its grammar."""
    message = choice["message"]
    if choice["matched_stop"] in ("99", "zz") or choice["finish_reason"] == "length":
        return
    if grammar in ("required", "named"):
        assert choice["finish_reason"] == "tool_calls"
        assert message["tool_calls"]
        for call in message["tool_calls"]:
            assert call["function"]["name"] == "f"
            jsonschema_rs.validate(SCHEMA, json.loads(call["function"]["arguments"]))
        return
    assert choice["finish_reason"] == "stop"
    if grammar == "schema":
        jsonschema_rs.validate(SCHEMA, json.loads(message["content"]))
    elif grammar == "regex":
        assert re.fullmatch(GRAMMARS["regex"]["regex"], message["content"])
    else:
        assert re.fullmatch(r"(ab|c[0-9])+\.", message["content"])


async def streamed(http: httpx.AsyncClient, **fields: Any) -> dict[int, dict[str, Any]]:
    """Return the choices of a stream, assembled from its chunks."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "stream": True, **fields}
    lines = (await http.post("/v1/chat/completions", json=body)).text.splitlines()
    assert lines[-2] == "data: [DONE]", lines[-3:]
    out: dict[int, dict[str, Any]] = {}
    for line in lines:
        if not line.startswith("data: {"):
            continue
        [choice] = json.loads(line[6:])["choices"]
        own = out.setdefault(choice["index"], {"content": "", "arguments": {}, "tokens": [], "finish_reason": None})
        own["content"] += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls") or ():
            arguments = own["arguments"]
            arguments[call["index"]] = arguments.get(call["index"], "") + (call["function"].get("arguments") or "")
        own["tokens"] += (choice["logprobs"] or {}).get("content") or ()
        own["finish_reason"] = choice["finish_reason"] or own["finish_reason"]
    return out


@pytest.mark.parametrize("grammar", ["schema", "regex", slow("required"), slow("ebnf"), slow("named")])
async def test_every_grammar_with_every_two_features(http: httpx.AsyncClient, grammar: str) -> None:
    """Whole and streamed answers are equal, every choice conforms to the grammar, and every token has its logprobs."""

    async def one(first: str, second: str) -> None:
        fields = {**GRAMMARS[grammar], **FEATURES[first], **FEATURES[second], "seed": 7}
        whole, stream = await asyncio.gather(ask(http, **fields), streamed(http, **fields))
        assert len(whole["choices"]) == len(stream) == fields.get("n", 1)
        for choice in whole["choices"]:
            check(grammar, choice)
            own = stream[choice["index"]]
            assert own["finish_reason"] == choice["finish_reason"]
            assert own["content"] == (choice["message"]["content"] or "")
            calls = choice["message"]["tool_calls"] or ()
            assert list(own["arguments"].values()) == [call["function"]["arguments"] for call in calls]
            tokens = (choice["logprobs"] or {}).get("content") or []
            # Sampling does not depend on other rows; logits differ by rounding.
            assert [token["token"] for token in own["tokens"]] == [token["token"] for token in tokens]
            np.testing.assert_allclose(
                [token["logprob"] for token in own["tokens"]], [token["logprob"] for token in tokens], atol=1e-3
            )
            if "logprobs" in fields:
                assert tokens
                for token in tokens:
                    assert 1 <= len(token["top_logprobs"]) <= 3
                    assert token["logprob"] <= 1e-3

    for pairs in itertools.batched(itertools.combinations(FEATURES, 2), 8):
        await asyncio.gather(*(one(*pair) for pair in pairs))


async def test_completions_take_grammars_too(http: httpx.AsyncClient) -> None:
    for fields in (*list(GRAMMARS.values())[:3], {"json_schema": json.dumps(SCHEMA)}):
        body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 120, "seed": 3, "echo": True, "logprobs": 2, **fields}
        answer = (await http.post("/v1/completions", json=body)).json()
        for choice in answer["choices"]:
            text = choice["text"][1:]
            if choice["finish_reason"] == "stop" and "schema" in str(fields):
                jsonschema_rs.validate(SCHEMA, json.loads(text))


async def test_a_response_can_be_cancelled_while_it_is_made(http: httpx.AsyncClient) -> None:
    long = {"type": "object", "properties": {"a": {"type": "string", "minLength": 800}}, "required": ["a"]}
    format = {"type": "json_schema", "name": "x", "schema": long, "strict": True}
    body = {"input": "x", "stream": True, "max_output_tokens": 900, "text": {"format": format}}
    kinds: list[str] = []
    name = ""
    async with http.stream("POST", "/v1/responses", json=body) as stream:
        async for line in stream.aiter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line[6:])
            kinds.append(event["type"])
            if event["type"] == "response.created":
                name = event["response"]["id"]
                assert (await http.post(f"/v1/responses/{name}/cancel")).json()["status"] == "cancelled"
    assert kinds[-1] == "response.cancelled"
    assert (await http.get(f"/v1/responses/{name}")).json()["status"] == "cancelled"


async def test_bad_grammars_disturb_nobody(http: httpx.AsyncClient) -> None:
    explosive = {"type": "integer", "multipleOf": 99999989, "minimum": 0, "maximum": 10**18}
    bad: list[dict[str, Any]] = [
        {"regex": "((("},
        {"ebnf": "root ::= other"},
        {"json_schema": {"type": "nonsense"}},
        {"json_schema": {"$ref": "#"}},
        {"json_schema": explosive},
        {"regex": "(a{1,2000}){1,2000}" * 30},
    ]

    async def refused(fields: dict[str, Any]) -> None:
        body = {"messages": [{"role": "user", "content": "x"}], **fields}
        response = await asyncio.wait_for(http.post("/v1/chat/completions", json=body), 10)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == next(iter(fields))

    # Once this grammar is compiled, its requests wait for nothing.
    await ask(http, **GRAMMARS["schema"])
    good = [ask(http, **GRAMMARS["schema"], seed=seed) for seed in range(8)]
    answers = await asyncio.gather(*map(refused, bad[:5]), *good)
    for answer in answers[5:]:
        assert answer is not None
        check("schema", answer["choices"][0])
