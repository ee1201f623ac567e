"""A chat completion."""

from client import make_client, model

with make_client() as client:
    answer = client.chat.completions.create(
        model=model(client),
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=32,
    )
print(answer.choices[0].message.content)
