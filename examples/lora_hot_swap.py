"""Load an adapter, use it and unload it.

Start the server with --enable-lora, --lora-root, --max-lora-rank and --lora-target-modules.

python lora_hot_swap.py FOLDER    # relative to --lora-root
"""

import sys

import httpx
from client import URL, make_client, model

FOLDER = sys.argv[1]


def change(what: str, **body: str) -> None:
    """Load or unload an adapter."""
    answer = httpx.post(f"{URL}/{what}_lora_adapter", json=body, timeout=60)
    answer.raise_for_status()
    print(what, answer.json()["loaded_adapters"])


with make_client() as client:
    base = model(client)
    change("load", lora_name="example", lora_path=FOLDER)
    for name in (base, f"{base}:example"):
        answer = client.completions.create(model=name, prompt="Hello", max_tokens=16)
        print(f"{name}: {answer.choices[0].text!r}")
    change("unload", lora_name="example")
