"""Offline inference: a batch of prompts, without a server.

python offline_batch.py [MODEL]
"""

import sys

from jaxserve import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Two plus two is", "The sky is"]

if __name__ == "__main__":
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
        for prompt, output in zip(
            PROMPTS, llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8)), strict=True
        ):
            print(f"{prompt}{output.text}")
