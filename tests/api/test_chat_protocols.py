"""Tools, reasoning, grammars, Responses and Messages over a fake engine: accepted and refused requests, and replies."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from api.app import create_app
from api.chat.conversation import template_messages
from api.chat.schemas import CalledFunction, ChatMessage, ContentPart, ToolCall
from jaxserve.errors import LaunchError, RequestError
from jaxserve.parsing.message_parser import select_parsers
from jaxserve.parsing.reasoning.registry import REASONING_FORMATS, detect_reasoning
from jaxserve.parsing.tool_calls.registry import TOOL_CALL_FORMATS, detect_tool_calls
from jaxserve.text.chat_template import CHATML
from jaxserve.text.completion_template import COMPLETION_TEMPLATES, CompletionTemplate
from tests.api.conftest import make_server
from tests.support.fakes import FakeEngineClient
from tests.support.tiny import VOCAB_SIZE

Http = AsyncTestClient[Litestar]
MESSAGES = [{"role": "user", "content": "x"}]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture
async def parsing() -> AsyncIterator[Http]:
    """A server with parsers and a completion template."""
    server = make_server(
        FakeEngineClient(VOCAB_SIZE, context_length=4096),
        reasoning_parser="qwen3",
        tool_call_parser="hermes",
        completion_template=CompletionTemplate(COMPLETION_TEMPLATES["qwen_coder"]),
        api_key="secret",
    )
    async with AsyncTestClient(create_app(server), timeout=20) as client:
        client.headers["x-api-key"] = "secret"
        yield client
    server.close()


async def refused(http: Http, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
    response = await http.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()["error"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools"),
        ({"tools": [TOOL] * 300}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"regex": "(", "temperature": 0}, "regex"),
        ({"ebnf": "root ::= nothing"}, "ebnf"),
        ({"json_schema": {"type": "nonsense"}}, "json_schema"),
        ({"regex": "a" * 300_000}, None),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True,
           "parameters": {"type": "object", "not": {}}}}]}, "tools"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    ],
)  # fmt: skip
async def test_chat_names_what_is_wrong(parsing: Http, fields: dict[str, Any], param: str | None) -> None:
    error = await refused(parsing, "/v1/chat/completions", **{"messages": MESSAGES, **fields})
    assert error["param"] == param


async def test_a_budget_needs_a_parser(http: Http) -> None:
    error = await refused(http, "/v1/chat/completions", messages=MESSAGES, thinking_budget=5)
    assert "--reasoning-parser" in error["message"]


async def test_grammars_can_be_switched_off() -> None:
    server = make_server(FakeEngineClient(VOCAB_SIZE), json_style=None)
    async with AsyncTestClient(create_app(server)) as http:
        error = await refused(http, "/v1/completions", prompt="x", regex="abc")
        assert error["param"] == "regex"
        assert "--grammar-backend" in error["message"]


async def test_forced_calls_whatever_the_model_would_say(parsing: Http) -> None:
    body = {
        "messages": MESSAGES,
        "tools": [TOOL],
        "tool_choice": "required",
        "max_tokens": 300,
        "parallel_tool_calls": False,
    }
    choice = (await parsing.post("/v1/chat/completions", json=body)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "f"
    assert isinstance(json.loads(call["function"]["arguments"]), dict)


async def test_a_call_cut_off_by_max_tokens_has_no_end(parsing: Http) -> None:
    body = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required", "max_tokens": 45}
    choice = (await parsing.post("/v1/chat/completions", json=body)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["arguments"].startswith("{")


async def test_suffixes_need_a_template(parsing: Http, http: Http) -> None:
    body = {"prompt": "def f(", "suffix": "): pass", "max_tokens": 3, "echo": False}
    assert (await parsing.post("/v1/completions", json=body)).status_code == 200
    assert (await refused(http, "/v1/completions", **body))["param"] == "suffix"
    assert (await refused(parsing, "/v1/completions", prompt=[1, 2], suffix="x"))["param"] == "suffix"


def test_completion_templates() -> None:
    template = CompletionTemplate("<s>{suffix}<p>{prompt}<m>")
    assert template.render("{suffix}", "{prompt}") == "<s>{prompt}<p>{suffix}<m>"
    for text in ("", "{prompt}", "{prompt}{prompt}{suffix}"):
        with pytest.raises(LaunchError, match="completion-template"):
            CompletionTemplate(text)


def turns(*messages: ChatMessage, template: str = "") -> list[dict[str, Any]]:
    return template_messages(messages, template)


def test_history_as_templates_want_it() -> None:
    call = ToolCall("1", CalledFunction("f", '{"a": 1}'))
    assert turns(
        ChatMessage("Developer", "be nice"),
        ChatMessage("assistant", None, tool_calls=[call], reasoning_content="hm"),
        ChatMessage("tool", [ContentPart("text", "a"), ContentPart("text", "b")], tool_call_id="1"),
        ChatMessage("function", "c", name="f"),
        ChatMessage("assistant", [ContentPart("thinking", thinking="so"), ContentPart("text", "d")]),
    ) == [
        {"role": "system", "content": "be nice"},
        {
            "role": "assistant", "content": "", "reasoning_content": "hm",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "a b", "tool_call_id": "1"},
        {"role": "tool", "content": "c", "name": "f"},
        {"role": "assistant", "content": "d", "reasoning_content": "so"},
    ]  # fmt: skip
    assert turns(ChatMessage("developer", "x"), template="{{ 'developer' }}")[0]["role"] == "developer"
    harmony = turns(ChatMessage("assistant", "x", reasoning_content="y"), template="message.thinking")
    assert harmony[0]["thinking"] == "y"


@pytest.mark.parametrize(
    "message",
    [
        ChatMessage("assistant", None, tool_calls=[ToolCall("1", CalledFunction("f", "[1]"))]),
        ChatMessage("assistant", None, tool_calls=[ToolCall("1", CalledFunction("f", "{"))]),
        ChatMessage("user", "x", tool_calls=[ToolCall("1", CalledFunction("f"))]),
        ChatMessage("user", [ContentPart("thinking", thinking="x")]),
        ChatMessage("robot", "x"),
    ],
)
def test_history_that_is_refused(message: ChatMessage) -> None:
    with pytest.raises(RequestError, match=r"messages\.0"):
        turns(message)


async def test_tools_reach_a_template_that_knows_none(parsing: Http) -> None:
    history = [
        {"role": "system", "content": "Be nice."},
        *MESSAGES,
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    ids = (await parsing.post("/tokenize", json={"messages": history, "tools": [TOOL]})).json()["tokens"]
    text = (await parsing.post("/detokenize", json={"tokens": ids})).json()["text"]
    assert '{"name": "f"' in text
    assert "Be nice." in text
    assert '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>' in text
    assert "<tool_response>\nsunny" in text


async def test_parsers_by_themselves(http: Http) -> None:
    body = {"text": "<think>why</think>so", "reasoning_parser": "Qwen3"}
    assert (await http.post("/separate_reasoning", json=body)).json() == {"reasoning_text": "why", "text": "so"}
    text = 'I call <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    body = {"text": text, "tools": [TOOL], "tool_call_parser": "qwen25"}
    assert (await http.post("/parse_function_call", json=body)).json() == {
        "normal_text": "I call",
        "calls": [{"tool_index": 0, "name": "f", "parameters": '{"a": 1}'}],
    }
    assert (await refused(http, "/separate_reasoning", text="x", reasoning_parser="y"))["param"] == "reasoning_parser"
    error = await refused(http, "/parse_function_call", text="x", tools=[TOOL], tool_call_parser="y")
    assert error["param"] == "tool_call_parser"


async def test_responses_are_kept_followed_and_forgotten(parsing: Http) -> None:
    made = (await parsing.post("/v1/responses", json={"input": "abc", "max_output_tokens": 4})).json()
    assert made["status"] == "incomplete"
    assert made["incomplete_details"] == {"reason": "max_output_tokens"}
    assert made["usage"]["output_tokens"] == 4
    path = f"/v1/responses/{made['id']}"
    assert (await parsing.get(path)).json() == made
    assert (await parsing.post(f"{path}/cancel")).json()["status"] == "incomplete"
    body = {"input": "more", "previous_response_id": made["id"], "max_output_tokens": 2}
    after = (await parsing.post("/v1/responses", json=body)).json()
    assert after["usage"]["input_tokens"] > made["usage"]["input_tokens"] + 4
    assert after["previous_response_id"] == made["id"]
    assert (await parsing.delete(path)).json()["deleted"] is True
    for method, target in (("GET", path), ("DELETE", path), ("POST", f"{path}/cancel")):
        assert (await parsing.request(method, target)).status_code == 404
    assert (await refused(parsing, "/v1/responses", 404, **body))["param"] == "previous_response_id"
    unkept = (await parsing.post("/v1/responses", json={"input": "x", "store": False, "max_output_tokens": 1})).json()
    assert (await parsing.get(f"/v1/responses/{unkept['id']}")).status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{"type": "computer_call"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"background": True}, "background"),
        ({"temperature": -1}, "temperature"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "response_format"),
    ],
)
async def test_responses_name_what_is_wrong(parsing: Http, fields: dict[str, Any], param: str) -> None:
    assert (await refused(parsing, "/v1/responses", **{"input": "x", **fields}))["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]}, "messages"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"stop_sequences": [""]}, "stop"),
    ],
)
async def test_messages_name_what_is_wrong(parsing: Http, fields: dict[str, Any], param: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 4, **fields}
    assert (await refused(parsing, "/v1/messages", **body))["param"] == param


async def test_messages_with_everything(parsing: Http) -> None:
    body: dict[str, Any] = {
        "max_tokens": 8,
        "system": [{"type": "text", "text": "Be nice.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "redacted_thinking", "data": "?"},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "ok"}]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "stop_sequences": ["zz"],
        "metadata": {"user_id": "me"},
    }
    answer = (await parsing.post("/v1/messages", json=body)).json()
    assert answer["stop_reason"] == "max_tokens"
    counted = (
        await parsing.post("/v1/messages/count_tokens", json={k: body[k] for k in ("messages", "system", "tools")})
    ).json()
    assert counted["input_tokens"] == answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"]
    stream = (await parsing.post("/v1/messages", json={**body, "stream": True})).text
    names = [line[7:] for line in stream.splitlines() if line.startswith("event: ")]
    assert names[0] == "message_start"
    assert names[-2:] == ["message_delta", "message_stop"]


async def test_either_kind_of_key_opens(parsing: Http) -> None:
    assert (await parsing.get("/v1/models")).status_code == 200
    del parsing.headers["x-api-key"]
    assert (await parsing.get("/v1/models")).status_code == 401
    assert (await parsing.get("/v1/models", headers={"authorization": "Bearer secret"})).status_code == 200
    assert (await parsing.get("/v1/models", headers={"x-api-key": "wrong"})).status_code == 401


@pytest.mark.parametrize(
    ("template", "reasoning", "tool_calls"),
    [
        (CHATML, None, None),
        ("<|im_start|> enable_thinking <think> <tool_call>", "qwen3", "hermes"),
        ("<|im_start|> <function=x> <tool_call>", None, "qwen3_coder"),
        ("<｜Assistant｜> {% if not thinking %}</think> <｜tool▁calls▁begin｜>", "deepseek-v3", "deepseekv31"),
        ("<｜Assistant｜><think></think> <｜tool▁calls▁begin｜> ```json", "deepseek-r1", "deepseekv3"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "gpt-oss", "gpt-oss"),
        ("<|im_middle|> <think> <|tool_calls_section_begin|>", "kimi_k2", "kimi_k2"),
        ("◁think▷", "kimi", None),
        ("[THINK] [TOOL_CALLS]", "mistral", "mistral"),
        ("[gMASK] <think> <arg_key>", "glm45", "glm45"),
        ('<|start_header_id|> <|python_tag|> "parameters":', None, "llama3"),
        ("]~b]ai <think>", "minimax", None),
    ],
)
def test_formats_are_detected_from_templates(template: str, reasoning: str | None, tool_calls: str | None) -> None:
    assert (detect_reasoning(template), detect_tool_calls(template)) == (reasoning, tool_calls)


async def test_names_of_formats(http: Http) -> None:
    server = make_server(FakeEngineClient(VOCAB_SIZE))
    template = server.tokenizer.chat_template
    for name in REASONING_FORMATS:
        assert select_parsers(name.upper(), "auto", template).reasoning is REASONING_FORMATS[name]
    for name in TOOL_CALL_FORMATS:
        assert select_parsers(None, name, template).tool_calls is TOOL_CALL_FORMATS[name]
    for reasoning, tool_calls in (("x", "auto"), (None, "x")):
        with pytest.raises(LaunchError, match="one of auto"):
            select_parsers(reasoning, tool_calls, template)
