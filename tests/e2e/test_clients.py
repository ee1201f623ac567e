"""Client libraries that users have (OpenAI, Anthropic and others) work with a server of the demo model."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

from tests.e2e.conftest import ServerProcess
from tests.support.marks import slow

pytestmark = pytest.mark.demo
ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".venv-clients"
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."


class Weather(BaseModel):
    """The structured output that is asked of the model."""

    city: str = Field(max_length=12)
    days: int = Field(ge=1, le=9)


@pytest.fixture
def client(demo: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def tool() -> Any:
    schema = {**Weather.model_json_schema(), "additionalProperties": False}
    return {"type": "function", "function": {"name": "weather", "parameters": schema, "strict": True}}


def test_openai_parses_into_a_model(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Weather, max_tokens=120, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)
    response = client.responses.parse(
        model="demo", input="What is the capital of France?", text_format=Weather, max_output_tokens=120, temperature=0
    )
    assert isinstance(response.output_parsed, Weather)


def test_openai_streams_with_its_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, tools=[tool()], tool_choice="required", max_tokens=120, temperature=0
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert final.choices[0].finish_reason == "tool_calls"
    [call, *_] = final.choices[0].message.tool_calls or ()
    assert Weather(**json.loads(call.function.arguments))
    with client.responses.stream(model="demo", input=MESSAGES[0]["content"], temperature=0) as events:
        for _ in events:
            pass
        assert events.get_final_response().output_text == PARIS


def test_a_conversation_with_a_tool(client: OpenAI) -> None:
    """A forced call is followed by its result in the history, and by an answer."""
    first = client.chat.completions.create(
        model="demo", messages=MESSAGES, tools=[tool()], max_tokens=120, temperature=0,
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )  # fmt: skip
    message = first.choices[0].message
    assert message.tool_calls
    history = [
        *MESSAGES,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"},
    ]
    second = client.chat.completions.create(model="demo", messages=history, tools=[tool()], max_tokens=20)
    assert second.choices[0].finish_reason in ("stop", "length", "tool_calls")
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_responses_follow_each_other(client: OpenAI) -> None:
    first = client.responses.create(model="demo", input="What is the capital of France?", temperature=0)
    assert first.output_text == PARIS
    second = client.responses.create(
        model="demo", input="And of Italy?", previous_response_id=first.id, temperature=0, max_output_tokens=20
    )
    assert second.usage is not None
    assert second.usage.input_tokens > 40
    assert client.responses.retrieve(first.id).output_text == PARIS
    client.responses.delete(first.id)
    with pytest.raises(Exception, match="no stored response"):
        client.responses.retrieve(first.id)
    with pytest.raises(Exception, match="no stored response"):
        client.responses.create(model="demo", input="x", previous_response_id=first.id)


@pytest.fixture
def anthropic(demo: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=demo.url, api_key="none", max_retries=0) as client:
        yield client


def test_anthropic(anthropic: Anthropic) -> None:
    body: Any = {"model": "demo", "max_tokens": 100, "messages": MESSAGES, "extra_body": {"temperature": 0}}
    assert anthropic.messages.create(**body).content[0].text == PARIS  # type: ignore[union-attr]
    with anthropic.messages.stream(**body) as stream:
        assert "".join(stream.text_stream) == PARIS
    tools: Any = [{"name": "weather", "input_schema": tool()["function"]["parameters"]}]
    with anthropic.messages.stream(**body, tools=tools, tool_choice={"type": "tool", "name": "weather"}) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    assert Weather(**final.content[0].input)  # type: ignore[union-attr]
    counted = anthropic.messages.count_tokens(model="demo", messages=MESSAGES)
    assert counted.input_tokens == 37


def test_bad_input_is_an_error_in_each_client(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="at most one"):
        client.chat.completions.create(model="demo", messages=MESSAGES, extra_body={"regex": "a", "ebnf": "b"})
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    with pytest.raises(BadRequestError, match="only text is"):
        client.chat.completions.create(model="demo", messages=image)
    with pytest.raises(BadRequestError, match="completion-template"):
        client.completions.create(model="demo", prompt="x", suffix="y")


@pytest.mark.parametrize("name", [slow("langchain"), slow("instructor"), slow("litellm")])
def test_other_python_clients(demo: ServerProcess, name: str) -> None:
    python = CLIENTS / "bin" / "python"
    if not python.exists():
        pytest.skip("scripts/setup_clients has not been run")
    run(str(python), str(ROOT / f"tests/e2e/clients/{name}_client.py"), demo.url)


def test_openai_for_node(demo: ServerProcess) -> None:
    if shutil.which("node") is None or not (CLIENTS / "node_modules").exists():
        pytest.skip("node is not here, or scripts/setup_clients has not been run")
    run("node", str(CLIENTS / "openai_client.mjs"), demo.url)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ok"
