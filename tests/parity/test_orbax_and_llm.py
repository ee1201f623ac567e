"""A converted checkpoint gives the same numbers; the offline interface gives the engine's tokens."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams, TextOptions
from jaxserve.build import build_runner
from jaxserve.config import EngineConfig
from jaxserve.errors import LaunchError, RequestError
from tests.tiny import write_checkpoint

SMALL = {"max_running_requests": 4, "chunked_prefill_size": 32, "max_total_tokens": 2048, "page_size": 16}


def script(name: str) -> ModuleType:
    path = Path(__file__).parent.parent.parent / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("orbax")
    source = write_checkpoint(base / "source")
    script("convert_checkpoint").convert(str(source), base / "converted", "auto")
    return source, base / "converted"


@pytest.mark.parametrize("tp_size", [1, 8])
def test_restored_weights_are_the_loaded_ones(folders: tuple[Path, Path], tp_size: int) -> None:
    loaded, restored = (
        build_runner(EngineConfig(model_path=str(folder), tp_size=tp_size, **SMALL), lambda items, *_: items).runner
        for folder in folders
    )
    for left, right in zip(
        jax.tree.leaves_with_path(loaded._parts.weights), jax.tree.leaves(restored._parts.weights), strict=True
    ):
        assert left[1].sharding == right.sharding, left[0]
        np.testing.assert_array_equal(left[1], right)


def test_a_folder_that_is_not_empty_is_left_alone(folders: tuple[Path, Path]) -> None:
    with pytest.raises(LaunchError, match="not empty"):
        script("convert_checkpoint").convert(str(folders[0]), folders[1], "auto")


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
