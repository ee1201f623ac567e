"""Splitting a model over devices and running several replicas change no token in float32, against one device."""

from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from tests.support.marks import slow
from tests.support.tiny import write_checkpoint

SMALL: dict[str, Any] = {
    "max_running_requests": 2,  # few programs to compile
    "chunked_prefill_size": 16,
    "max_total_tokens": 2048,
    "page_size": 16,
    "dtype": "float32",
}
MESHES: list[dict[str, int]] = [{"tp_size": 8}, {"tp_size": 2, "dp_size": 2}]
# Qwen2 has biases, and is otherwise split as the others are. test_golden.py covers two and four devices, and two
# replicas.
CASES = [
    ("Qwen2ForCausalLM", MESHES),
    slow("Qwen2ForCausalLM", [{"tp_size": 4, "dp_size": 2}]),
    slow("LlamaForCausalLM", MESHES),
    slow("MistralForCausalLM", MESHES),
    slow("Qwen3ForCausalLM", MESHES),
]
PROMPTS = [[1, 2, 3], [4] * 40, [5, 6], [7]]
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0, max_tokens=12),
    # "flat" has a filter that reaches past the candidates, "everything" uses all of a row's state.
    "flat": SamplingParams(seed=5, max_tokens=12, temperature=30.0, top_p=0.95),
    "everything": SamplingParams(
        seed=6, max_tokens=12, min_tokens=6, frequency_penalty=1.0, repetition_penalty=1.3, top_k=40,
        logit_bias={65: 5.0, 66: -100.0, 259: 3.0}, num_logprobs=3,
    ),
}  # fmt: skip


def tokens(folder: Path, **mesh: int) -> list[Any]:
    with LLM(str(folder), **SMALL, **mesh) as llm:
        return [
            [(choice.token_ids, choice.finish_reason) for choice in output.choices]
            for sampling in SAMPLINGS.values()
            for output in llm.generate(PROMPTS, sampling)
        ]


@pytest.mark.parametrize(("family", "meshes"), CASES)
def test_any_mesh_gives_the_same_tokens(family: str, meshes: list[dict[str, int]], tmp_path: Path) -> None:
    # 264 is divisible by every number of devices, so the vocabulary is split, too.
    folder = write_checkpoint(tmp_path, architectures=[family], vocab_size=264, sliding_window=24)
    want = tokens(folder)
    assert all(ids for output in want for ids, _ in output)
    for mesh in meshes:
        assert tokens(folder, **mesh) == want, mesh
