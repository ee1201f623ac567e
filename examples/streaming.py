"""A streamed chat completion: text as it is generated, then the token usage."""

from client import make_client, model

with make_client() as client:
    stream = client.chat.completions.create(
        model=model(client),
        messages=[{"role": "user", "content": "Count to five."}],
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            print(f"\n{chunk.usage.completion_tokens} tokens")
