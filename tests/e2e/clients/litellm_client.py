"""Check litellm: completions, streams, tools, and the errors it maps. The argument is the server's address."""

import json
import sys

import litellm

litellm.telemetry = False
common = {
    "model": "openai/demo",
    "api_base": f"{sys.argv[1]}/v1",
    "api_key": "none",
    "temperature": 0,
    "max_tokens": 80,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
}
answer = litellm.completion(**common)
assert answer.choices[0].message.content == "The capital of France is Paris."
assert answer.usage.completion_tokens == 8
text = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**common, stream=True))
assert text == "The capital of France is Paris."

parameters = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
called = litellm.completion(**common, tools=[tool], tool_choice="required").choices[0]
assert called.finish_reason == "tool_calls"
assert list(json.loads(called.message.tool_calls[0].function.arguments)) == ["city"]

try:
    litellm.completion(**{**common, "temperature": -1})
except litellm.BadRequestError as error:
    assert "temperature" in str(error)
else:
    raise AssertionError("a bad request was taken")
print("ok")
