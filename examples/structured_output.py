"""Structured output: JSON that follows a schema."""

import json

from client import make_client, model

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 99999999},
    },
    "required": ["name", "population"],
    "additionalProperties": False,
}

with make_client() as client:
    answer = client.chat.completions.create(
        model=model(client),
        messages=[{"role": "user", "content": "Describe Paris."}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}},
        max_tokens=200,
    )
print(json.loads(answer.choices[0].message.content))
