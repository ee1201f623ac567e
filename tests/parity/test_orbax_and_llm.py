"""A converted checkpoint gives the same weights and tokens as its source; `LLM` gives the engine's tokens."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams, TextOptions
from jaxserve.config import EngineConfig
from jaxserve.convert import convert
from jaxserve.engine.builder import build_runner
from jaxserve.errors import LaunchError, RequestError
from tests.support.tiny import write_checkpoint, write_gguf

SMALL = {"max_running_requests": 4, "chunked_prefill_size": 32, "max_total_tokens": 2048, "page_size": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("orbax")
    source = write_checkpoint(base / "source")
    convert(str(source), base / "converted", "auto")
    return source, base / "converted"


@pytest.mark.parametrize("tp_size", [1, 8])
def test_restored_weights_are_the_loaded_ones(folders: tuple[Path, Path], tp_size: int) -> None:
    loaded, restored = (
        build_runner(EngineConfig(model_path=str(folder), tp_size=tp_size, **SMALL), lambda items, *_: items).runner
        for folder in folders
    )
    for left, right in zip(jax.tree.leaves_with_path(loaded._weights), jax.tree.leaves(restored._weights), strict=True):
        assert left[1].sharding == right.sharding, left[0]
        np.testing.assert_array_equal(left[1], right)


def test_a_gguf_file_is_converted(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    convert(str(tmp_path / "tiny.gguf"), tmp_path / "converted", "float32")
    outputs = []
    for path in (tmp_path / "tiny.gguf", tmp_path / "converted"):
        with LLM(str(path), dtype="float32", **SMALL) as llm:
            outputs.append(llm.generate(["one"], SamplingParams(temperature=0, max_tokens=8))[0])
    assert outputs[0] == outputs[1]


def test_dp_replicas_sample_same_tokens(folders: tuple[Path, Path]) -> None:
    """The requests use everything in a row's device state: penalties, biases, forbidden stops."""
    prompts = [[1, 2, 3], [4, 5], [6] * 20, [7, 8, 9, 10], [11], [12, 13]]
    sampling = SamplingParams(
        seed=5, max_tokens=12, min_tokens=6, frequency_penalty=1.0, repetition_penalty=1.3,
        logit_bias={65: 5.0, 66: -100.0}, num_logprobs=0,
    )  # fmt: skip
    answers = []
    for dp_size in (1, 2):
        with LLM(str(folders[0]), dp_size=dp_size, **SMALL) as llm:
            answers.append([output.choices[0].token_ids for output in llm.generate(prompts, sampling)])
    assert answers[0] == answers[1]


def test_a_folder_that_is_not_empty_is_left_alone(folders: tuple[Path, Path]) -> None:
    with pytest.raises(LaunchError, match="not empty"):
        convert(str(folders[0]), folders[1], "auto")


async def test_offline_generation(folders: tuple[Path, Path]) -> None:
    with LLM(str(folders[1]), **SMALL) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=8)
        first, second = llm.generate(["one", "two"], greedy)
        assert llm.generate("two", greedy)[0].choices == second.choices
        assert first.usage.completion_tokens <= 8
        sampled = llm.generate([[1, 2, 3]], SamplingParams(seed=3, max_tokens=8, num_logprobs=0), num_choices=2)[0]
        assert len(sampled.choices) == 2
        assert sampled.choices[0].logprobs
        repeated = await llm.agenerate([[1, 2, 3]], SamplingParams(seed=3, max_tokens=8, num_logprobs=0), num_choices=2)
        assert repeated[0].choices == sampled.choices
        answer = llm.chat([{"role": "user", "content": "hi"}], greedy, options=TextOptions(skip_special_tokens=False))
        again = await llm.achat([{"role": "user", "content": "hi"}], greedy)
        assert again.usage.completion_tokens == answer.usage.completion_tokens
        with pytest.raises(RequestError, match="got 3000"):
            llm.generate([[1] * 3000])
