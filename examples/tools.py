"""A tool call: a grammar ensures that it names a declared tool and that its arguments follow the tool's schema."""

import json

from client import make_client, model

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}

with make_client() as client:
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.chat.completions.create(
        model=model(client), messages=messages, tools=[TOOL], tool_choice="required", max_tokens=200
    )
    message = answer.choices[0].message
    call = message.tool_calls[0]
    print(call.function.name, json.loads(call.function.arguments))
    messages += [
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"},
    ]
    answer = client.chat.completions.create(model=model(client), messages=messages, max_tokens=32)
    print(answer.choices[0].message.content)
