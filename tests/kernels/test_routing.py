"""Routers against numpy in float64; the Pallas kernel runs in interpret mode, with race detection."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.parallel.mesh import make_mesh
from kernels_pallas.routing.api import Router, RouterConfig, Routing
from kernels_pallas.routing.reference import route
from kernels_pallas.routing.xla.backend import XlaRouter
from kernels_pallas.stacked import Stacked
from tests.support.marks import slow

needs_pallas = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
KERNELS = ["xla", pytest.param("gpu", marks=needs_pallas)]
# Number of experts, and the routing of models that have as many.
CONFIGS = {
    "mixtral": (8, RouterConfig(2)),
    "gpt-oss": (32, RouterConfig(4, "softmax_of_chosen")),
    "qwen3": (128, RouterConfig(8)),
    "deepseek-v2": (64, RouterConfig(6, normalize=False, scale=16.0, num_groups=4, top_groups=2, group_scores=1)),
    "deepseek-v3": (256, RouterConfig(8, "sigmoid", scale=2.5, num_groups=8, top_groups=4)),
    "kimi-k2": (384, RouterConfig(8, "sigmoid", scale=2.827)),
}


def router(name: str, config: RouterConfig) -> Router:
    if name == "xla":
        return XlaRouter(config)
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels_pallas.routing.gpu.backend import GpuRouter

    return GpuRouter(config, make_mesh(1), plgpu.InterpretGPUParams(detect_races=True))


def check(got: Routing, want: list[dict[int, float]]) -> None:
    for id_U, weight_U, expected in zip(np.asarray(got.id_TU), np.asarray(got.weight_TU), want, strict=True):
        assert list(id_U) == list(expected)
        np.testing.assert_allclose(weight_U, list(expected.values()), rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "num_tokens"),
    [("mixtral", 1), ("gpt-oss", 100), ("qwen3", 8), ("deepseek-v2", 8), ("deepseek-v3", 8), slow("kimi-k2", 8)],
)
@pytest.mark.parametrize("name", KERNELS)
def test_routers_match_numpy(name: str, model: str, num_tokens: int) -> None:
    """100 tokens take two thread blocks, the second of which is partly padding."""
    num_experts, config = CONFIGS[model]
    rng = np.random.default_rng(num_experts)
    logits_TE = jnp.asarray(rng.standard_normal((num_tokens, num_experts)), jnp.float32)
    corrections = jnp.asarray(rng.standard_normal((3, num_experts)) / 10, jnp.float32)
    correction = Stacked(corrections, jnp.int32(1)) if config.scores == "sigmoid" else None
    got = jax.jit(router(name, config))(logits_TE, correction)
    check(got, route(np.asarray(logits_TE), None if correction is None else np.asarray(corrections)[1], config))


@pytest.mark.parametrize("model", ["gpt-oss", "qwen3", "deepseek-v3"])
@pytest.mark.parametrize("name", KERNELS)
def test_ties_go_to_the_lower_index(name: str, model: str) -> None:
    """Equal scores are in different warpgroups, and whole groups of experts are equal."""
    num_experts, config = CONFIGS[model]
    logits_E = np.tile(np.float32([0, 1, -1, 1]), num_experts // 4)
    logits_TE = np.stack([logits_E, np.zeros(num_experts, np.float32), -logits_E])
    check(jax.jit(router(name, config))(jnp.asarray(logits_TE)), route(logits_TE, None, config))


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
