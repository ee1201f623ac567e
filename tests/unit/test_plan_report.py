"""Weights per token and shares of experts, from which speed is bounded, against the published sizes of models."""

from typing import Any

import pytest

from jaxserve.models.registry import find_architecture
from jaxserve.plan.report import experts_read, num_multiplied
from tests.compile.models import DEEPSEEK_V31, GPT_OSS_20B, GPT_OSS_120B, LLAMA31_8B, QWEN3_30B_A3B, QWEN3_235B_A22B


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        # Active parameters as the models' authors count them, less the input embedding.
        (LLAMA31_8B, 8.03 - 0.53),
        (QWEN3_30B_A3B, 3.35 - 0.31),
        (QWEN3_235B_A22B, 22.2 - 0.62),
        (GPT_OSS_20B, 3.61 - 0.0),
        (GPT_OSS_120B, 5.13 - 0.0),
        (DEEPSEEK_V31, 37.6 - 0.93),
    ],
)
def test_weights_that_a_token_is_multiplied_with(config: dict[str, Any], billions: float) -> None:
    model = find_architecture(config).model_config(config)
    assert num_multiplied(model) == pytest.approx(billions * 1e9, rel=0.02)


def test_share_of_experts_that_a_step_reads() -> None:
    model = find_architecture(QWEN3_30B_A3B).model_config(QWEN3_30B_A3B)
    assert experts_read(model, 1) == pytest.approx(8 / 128)
    assert 0.99 < experts_read(model, 256) < 1
    assert experts_read(find_architecture(LLAMA31_8B).model_config(LLAMA31_8B), 5) == 0
