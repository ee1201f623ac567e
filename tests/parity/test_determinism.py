"""With --enable-deterministic-inference, a request's tokens are those it gets alone, whatever else happens.

The same request is run in a batch with others, after a prefix cache hit, and with preemption.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from tests.support.tiny import write_checkpoint

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, size).tolist() for size in (200, 3, 90, 41, 130)]
COMPANY = [RNG.integers(0, 256, int(size)).tolist() for size in RNG.integers(1, 120, 31)]
SAMPLING = SamplingParams(seed=11, temperature=1.0, top_p=0.95, max_tokens=40, ignore_eos=True, num_logprobs=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("deterministic") / "tiny")


def load(checkpoint: Path, **options: object) -> LLM:
    settings = {"dtype": "bfloat16", "deterministic": True, "page_size": 16, "max_running_requests": 32,
                "chunked_prefill_size": 64, "max_total_tokens": 32 * 512}  # fmt: skip
    return LLM(str(checkpoint), **{**settings, **options})


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with load(checkpoint) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[object]:
    return [llm.generate([prompt], SAMPLING)[0].choices for prompt in PROMPTS]


def test_among_others(llm: LLM, alone: list[object]) -> None:
    for index, prompt in enumerate(PROMPTS):
        outputs = llm.generate([*COMPANY[:index], prompt, *COMPANY[index:]], SAMPLING)
        assert outputs[index].choices == alone[index]


def test_after_a_prefix_hit(llm: LLM, alone: list[object]) -> None:
    output = llm.generate([PROMPTS[0]], SAMPLING)[0]
    assert output.usage.cached_tokens > 0
    assert output.choices == alone[0]


def test_after_preemption(checkpoint: Path, alone: list[object]) -> None:
    """The page pool holds two of the five requests at full length."""
    with load(checkpoint, max_total_tokens=512, context_length=256, prefix_caching=False) as llm:
        outputs = llm.generate(PROMPTS, SAMPLING)
        assert llm.stats.num_preemptions > 0
    assert [output.choices for output in outputs] == alone
