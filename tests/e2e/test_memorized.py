"""Every family's own output, drawn by a model and read over HTTP: whole and streamed, in three protocols.

The engine runs in this process, so that one load serves all parsers; the servers and sockets are real.
"""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from openai import AsyncOpenAI

from api.server import ApiSettings, Server
from jaxserve.engine.in_process_client import InProcessEngineClient
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from tests.e2e.conftest import loaded, serving
from tests.support.marks import slow
from tests.support.memorized import FAMILIES, MEMORIZED, Memorized
from tests.support.transcripts import TOOLS

MODELS = Path(__file__).parents[1] / "models"
FOLDER = MODELS / "memorized"
TOOL_FIELDS: Any = [
    {"type": "function", "function": {"name": tool.name, "parameters": dict(tool.parameters) or {"type": "object"}}}
    for tool in TOOLS
]


@pytest.fixture(scope="module")
async def engine(compilation_cache: str) -> AsyncIterator[InProcessEngineClient]:
    options: Any = {"max_running_requests": 8, "chunked_prefill_size": 64, "max_total_tokens": 8192}
    async with loaded(FOLDER, compilation_cache_dir=compilation_cache, **options) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(FOLDER)


def server(engine: InProcessEngineClient, case: Memorized) -> Server:
    """With the family's parsers."""
    settings = ApiSettings(
        model_path="memorized", served_model_name="memorized", reasoning_parser=case.reasoning_parser,
        tool_call_parser=case.tool_call_parser,
    )  # fmt: skip
    return Server(settings, engine)


def options(case: Memorized) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": "memorized", "messages": [{"role": "user", "content": case.name}], "temperature": 0,
        "extra_body": {"chat_template_kwargs": {"opening": case.opening}},
    }  # fmt: skip
    return {**body, "tools": TOOL_FIELDS} if case.calls else body


def meant(case: Memorized) -> tuple[Any, ...]:
    """Thinking, content, calls and finish reason."""
    calls = [(call.name, call.arguments) for call in case.calls]
    return case.reasoning, case.content, calls, "tool_calls" if calls else "stop"


@pytest.mark.parametrize("case", MEMORIZED, ids=lambda case: case.name)
async def test_chat(engine: InProcessEngineClient, tokenizer: Tokenizer, case: Memorized) -> None:
    await check_chat(engine, tokenizer, case)


# Kimi's is DeepSeek's architecture.
@pytest.mark.parametrize("family", [slow(family) if family == "deepseek" else family for family in FAMILIES])
async def test_families(family: str, compilation_cache: str) -> None:
    """Qwen3, DeepSeek V3, Kimi K2 and gpt-oss in small, with files as their makers publish them."""
    folder = MODELS / f"memorized_{family}"
    options: Any = {"max_running_requests": 2, "chunked_prefill_size": 32, "max_total_tokens": 2048}
    async with loaded(folder, compilation_cache_dir=compilation_cache, **options) as engine:
        for case in MEMORIZED:
            if case.name in FAMILIES[family]:
                await check_chat(engine, load_tokenizer(folder), case)


async def check_chat(engine: InProcessEngineClient, tokenizer: Tokenizer, case: Memorized) -> None:
    """What an output means is what a client reads, whole and streamed."""
    async with (
        serving(server(engine, case), tokenizer) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        whole = await client.chat.completions.create(**options(case))
        choice = whole.choices[0]
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()]  # type: ignore[union-attr]
        reasoning = choice.message.reasoning_content  # type: ignore[attr-defined]
        assert (reasoning or "", choice.message.content or "", calls, choice.finish_reason) == meant(case)
        assert (reasoning is None) == (not case.reasoning)
        assert whole.usage is not None
        assert whole.usage.completion_tokens_details is not None
        thinking = whole.usage.completion_tokens_details.reasoning_tokens or 0
        # One token a byte, and the tags.
        size = len(case.reasoning.encode())
        assert size <= thinking <= size + 20 if case.reasoning else thinking == 0

        stream = await client.chat.completions.create(**options(case), stream=True)
        calls_by_index: dict[int, list[str]] = {}
        text = {"content": "", "reasoning_content": ""}
        reason = None
        async for chunk in stream:
            delta = chunk.choices[0].delta
            for name in text:
                text[name] += getattr(delta, name, None) or ""
            for call in delta.tool_calls or ():
                assert call.function is not None
                if call.index not in calls_by_index:
                    assert call.id, "the id and the name come first"
                    assert not call.function.arguments
                    calls_by_index[call.index] = [call.function.name or "", ""]
                else:
                    assert (call.id, call.function.name) == (None, None)
                    calls_by_index[call.index][1] += call.function.arguments or ""
            reason = chunk.choices[0].finish_reason or reason
        streamed = [(name, json.loads(arguments)) for name, arguments in calls_by_index.values()]
        assert (text["reasoning_content"], text["content"], streamed, reason) == meant(case)


@pytest.mark.parametrize("case", [r for r in MEMORIZED if r.name in ("qwen3", "gpt", "r1")], ids=lambda r: r.name)
async def test_the_other_protocols(engine: InProcessEngineClient, tokenizer: Tokenizer, case: Memorized) -> None:
    calls = [(call.name, call.arguments) for call in case.calls]
    # Their bodies have no room for template variables: what the prompt would open is part of the message.
    if case.opening:
        case = next(r for r in MEMORIZED if r.name == "r1 silent")
    async with (
        serving(server(engine, case), tokenizer) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
        anthropic.AsyncAnthropic(base_url=url, api_key="none") as other,
    ):
        flat: Any = [{"type": "function", **tool["function"]} for tool in TOOL_FIELDS] if calls else []
        response = await client.responses.create(model="memorized", input=case.name, tools=flat, temperature=0)
        events = [
            event
            async for event in await client.responses.create(
                model="memorized", input=case.name, tools=flat, temperature=0, stream=True
            )
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        for answer in (response, events[-1].response):  # type: ignore[union-attr]
            by_type = {item.type: item for item in answer.output}
            assert by_type["reasoning"].content[0].text == case.reasoning  # type: ignore[union-attr, index]
            assert answer.output_text == case.content
            own = [(item.name, json.loads(item.arguments)) for item in answer.output if item.type == "function_call"]
            assert own == calls
            assert answer.status == "completed"
        theirs: Any = [
            {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOL_FIELDS
        ]
        body: Any = {
            "model": "memorized", "max_tokens": 400, "messages": [{"role": "user", "content": case.name}],
            "tools": theirs if calls else [], "extra_body": {"temperature": 0},
        }  # fmt: skip
        message = await other.messages.create(**body)
        async with other.messages.stream(**body) as stream:
            final = await stream.get_final_message()
        for answer in (message, final):
            blocks = [
                (block.type, getattr(block, "text", None) or getattr(block, "thinking", None))
                for block in answer.content
            ]
            expected = [("thinking", case.reasoning)]
            expected += [("text", case.content)] if case.content else []
            assert [block for block in blocks if block[0] != "tool_use"] == expected
            assert [(b.name, b.input) for b in answer.content if b.type == "tool_use"] == calls  # type: ignore[union-attr]
            assert answer.stop_reason == ("tool_use" if calls else "end_turn")


async def test_thinking_can_be_left_in_withheld_and_limited(
    engine: InProcessEngineClient, tokenizer: Tokenizer
) -> None:
    case = next(r for r in MEMORIZED if r.name == "r1")
    async with serving(server(engine, case), tokenizer) as url, httpx.AsyncClient(base_url=url) as http:
        body = options(case)
        body |= body.pop("extra_body")
        raw = (await http.post("/v1/chat/completions", json={**body, "separate_reasoning": False})).json()
        assert raw["choices"][0]["message"]["content"] == case.output
        assert raw["choices"][0]["message"]["reasoning_content"] is None

        text = (await http.post("/v1/chat/completions", json={**body, "stream": True, "stream_reasoning": False})).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        thoughts = [chunk["choices"][0]["delta"].get("reasoning_content") for chunk in chunks]
        assert [thought for thought in thoughts if thought] == [case.reasoning]

        cut = (await http.post("/v1/chat/completions", json={**body, "thinking_budget": 7, "max_tokens": 20})).json()
        message, usage = cut["choices"][0]["message"], cut["usage"]
        assert message["reasoning_content"] == case.reasoning[:5] + "…"[:1]
        assert usage["completion_tokens_details"]["reasoning_tokens"] == len("Paris…".encode()) + 1


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_budget_closes_a_channel(engine: InProcessEngineClient, tokenizer: Tokenizer, choice: str) -> None:
    """What follows the thinking is begun, too: the answer, or a call."""
    case = next(r for r in MEMORIZED if r.name == "gpt")
    async with serving(server(engine, case), tokenizer) as url, httpx.AsyncClient(base_url=url) as http:
        body = {**options(case), "thinking_budget": 5, "max_tokens": 160, "tool_choice": choice}
        body.pop("extra_body")
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        message = answer["choices"][0]["message"]
        assert message["reasoning_content"] == "Paris"
        assert bool(message["tool_calls"]) == (choice == "required")
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("Paris") + 2


async def test_a_grammar_waits_for_the_end_of_thinking(engine: InProcessEngineClient, tokenizer: Tokenizer) -> None:
    case = next(r for r in MEMORIZED if r.name == "r1")
    async with serving(server(engine, case), tokenizer) as url, httpx.AsyncClient(base_url=url) as http:
        body = options(case)
        body |= {**body.pop("extra_body"), "regex": "(one|two)!"}
        for stream in (False, True):
            answer = await http.post("/v1/chat/completions", json={**body, "stream": stream})
            if stream:
                chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
                deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
                message = {
                    name: "".join(delta.get(name) or "" for delta in deltas)
                    for name in ("content", "reasoning_content")
                }
            else:
                message = answer.json()["choices"][0]["message"]
            assert message["reasoning_content"] == case.reasoning
            assert message["content"] in ("one!", "two!")
