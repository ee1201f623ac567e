"""Reasoning separated from the answer; start the server with --reasoning-parser."""

from client import make_client, model

with make_client() as client:
    answer = client.chat.completions.create(
        model=model(client),
        messages=[{"role": "user", "content": "What is 17 times 3?"}],
        max_tokens=64,
        extra_body={"thinking_budget": 32},
    )
message = answer.choices[0].message
print("thinking:", getattr(message, "reasoning_content", None))
print("answer:", message.content)
