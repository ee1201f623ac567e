"""The default number of groups that experts are divided among."""

from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.layout.expert_groups import choose_ep_size
from tests.compile.models import DEEPSEEK_V31, LLAMA31_8B, MIXTRAL_8X22B, QWEN3_30B_A3B


@pytest.mark.parametrize(
    ("model", "platform", "options", "ep_size"),
    [
        # Experts of 768: shards of 96 would be padded to 128, those of 384 are whole.
        (QWEN3_30B_A3B, "tpu", {"tp_size": 8}, 4),
        (QWEN3_30B_A3B, "tpu", {"tp_size": 2}, 1),
        (QWEN3_30B_A3B, "tpu", {"tp_size": 8, "ep_size": 1}, 1),
        # Two blocks of scales for each shard of 2,048.
        (DEEPSEEK_V31, "tpu", {"tp_size": 16}, 2),
        (QWEN3_30B_A3B, "gpu", {"tp_size": 8}, 1),
        (MIXTRAL_8X22B, "tpu", {"tp_size": 8}, 1),
        (LLAMA31_8B, "tpu", {"tp_size": 8}, 1),
    ],
)
def test_shards_of_experts_fill_whole_lanes_on_tpu(
    model: dict[str, Any], platform: str, options: dict[str, Any], ep_size: int
) -> None:
    assert choose_ep_size(EngineConfig(model_path="model", **options), model, platform) == ep_size
