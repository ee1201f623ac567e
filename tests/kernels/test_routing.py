"""Routers against numpy in float64; the Pallas kernel runs in interpret mode, with race detection."""

from typing import Any

import jax
import numpy as np
import pytest

from kernels_pallas.routing.api import RouterConfig
from kernels_pallas.routing.cases import random_logits, routing_case, tied_logits
from kernels_pallas.routing.xla.backend import XlaRouter
from tests.support.kernels import KERNELS, interpreted, needs_pallas
from tests.support.marks import slow

# Number of experts, and the routing of models that have as many.
CONFIGS = {
    "mixtral": (8, RouterConfig(2)),
    "gpt-oss": (32, RouterConfig(4, "softmax_of_chosen")),
    "qwen3": (128, RouterConfig(8)),
    "deepseek-v2": (64, RouterConfig(6, normalize=False, scale=16.0, num_groups=4, top_groups=2, group_scores=1)),
    "deepseek-v3": (256, RouterConfig(8, "sigmoid", scale=2.5, num_groups=8, top_groups=4)),
    "kimi-k2": (384, RouterConfig(8, "sigmoid", scale=2.827)),
}


def check(name: str, model: str, logits_TE: np.ndarray) -> None:
    num_experts, config = CONFIGS[model]
    router = XlaRouter(config) if name == "xla" else interpreted(name).router(config, num_experts)
    step = routing_case(router, config, logits_TE, corrected=config.scores == "sigmoid")
    step.verify(jax.jit(step.run)(*step.arguments))


@pytest.mark.parametrize(
    ("model", "num_tokens"),
    [("mixtral", 1), ("gpt-oss", 100), ("qwen3", 8), ("deepseek-v2", 8), ("deepseek-v3", 8), slow("kimi-k2", 8)],
)
@pytest.mark.parametrize("name", ["xla", KERNELS[1]])
def test_routers_match_numpy(name: str, model: str, num_tokens: int) -> None:
    """100 tokens take two thread blocks, the second of which is partly padding."""
    check(name, model, random_logits(num_tokens, CONFIGS[model][0]))


@pytest.mark.parametrize("model", ["gpt-oss", "qwen3", "deepseek-v3"])
@pytest.mark.parametrize("name", ["xla", KERNELS[1]])
def test_ties_go_to_the_lower_index(name: str, model: str) -> None:
    """Equal scores are in different warpgroups, and whole groups of experts are equal."""
    check(name, model, tied_logits(CONFIGS[model][0]))


@needs_pallas
@pytest.mark.parametrize(
    ("num_experts", "config"),
    [
        (60, RouterConfig(4)),  # no whole tile of columns
        (160, RouterConfig(6, num_groups=8, top_groups=3)),  # nor in a group
        (512, RouterConfig(8)),  # too many for the registers
        (256, RouterConfig(8, num_groups=16, top_groups=4)),  # too many groups
        (64, RouterConfig(8, num_groups=8, top_groups=4, group_scores=3)),
    ],
)
def test_what_the_gpu_kernel_cannot_do(num_experts: int, config: Any) -> None:
    from kernels_pallas.routing.gpu.backend import num_parts

    with pytest.raises(NotImplementedError, match="the kernel"):
        num_parts(config, num_experts)
