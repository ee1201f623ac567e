"""Whether activations are quantised: by the weights' format, the flags, and what the devices multiply."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.device_check.examples import DENSE, LATENT_AND_FP8
from jaxserve.layers.context import MAX_EXACT_TOKENS, Backends, LinearOps
from jaxserve.layout.layout import layout_engine, layout_model
from jaxserve.parallel.mesh import make_mesh
from kernels_pallas.dispatch import multiplies
from kernels_pallas.grouped_matmul.xla.backend import XlaGroupedMatmul

_INT8_WEIGHTS: dict[str, Any] = {
    "type": "int", "num_bits": 8, "symmetric": True, "dynamic": False, "strategy": "channel",
}  # fmt: skip


def compressed(activations: dict[str, Any] | None) -> dict[str, Any]:
    """Return a model whose checkpoint has int8 weights."""
    group = {"targets": ["Linear"], "weights": _INT8_WEIGHTS, "input_activations": activations}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
    return DENSE | {"quantization_config": settings | {"ignore": ["lm_head"]}}


def backends(model: dict[str, Any], **options: Any) -> Backends:
    config = EngineConfig(model_path="model", **options)
    return layout_engine(config, layout_model(config, model, make_mesh(1)), 64 << 20).step.backends


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"quantization": "w8a8_int8"}, "xla"),
        ({"quantization": "w8a8_fp8"}, "xla"),
        ({"quantization": "int8"}, "exact"),
        ({"quantization": "w8a8_int8", "activation_quantization": "none"}, "exact"),
        ({"quantization": "w8a8_int8", "deterministic": True}, "exact"),
    ],
)
def test_what_the_user_asks_for(options: dict[str, Any], want: str) -> None:
    assert backends(DENSE, **options).linear_activations == want


def test_a_cpu_is_slower_with_quantised_activations(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        backends(DENSE, quantization="w8a8_int8")
    assert "cpu does not multiply int8: --activation-quantization none is exact, and faster" in caplog.text


@pytest.mark.parametrize("model", [LATENT_AND_FP8, compressed({"dynamic": True, "num_bits": 8}), compressed(None)])
def test_a_checkpoint_does_not_make_a_cpu_slower(model: dict[str, Any]) -> None:
    """Weights that were made for quantised activations use them only where that is faster."""
    chosen = backends(model)
    assert (chosen.linear_activations, chosen.expert_activations) == ("exact", "exact")


@pytest.mark.parametrize(
    ("platform", "kind", "element", "want"),
    [
        ("tpu", "TPU v6 lite", "int8", True),
        ("tpu", "TPU v5 lite", "int8", True),
        ("tpu", "TPU v6 lite", "fp8", False),
        ("tpu", "TPU7x", "fp8", True),
        ("cuda", "NVIDIA H100 80GB HBM3", "int8", True),
        ("cpu", "cpu", "int8", False),
    ],
)
def test_what_devices_multiply(platform: str, kind: str, element: str, want: bool) -> None:
    device = SimpleNamespace(platform=platform, device_kind=kind)
    mesh: Any = SimpleNamespace(devices=SimpleNamespace(flat=[device]))
    assert multiplies(mesh, element) == want


def test_small_steps_stay_exact() -> None:
    ops = LinearOps(XlaGroupedMatmul(), make_mesh(1), (), "xla")
    assert ops.quantizes(MAX_EXACT_TOKENS) == "exact"
    assert ops.quantizes(MAX_EXACT_TOKENS + 1) == "xla"
    assert not ops.uses_stack(("mlp", "up_proj"), quantized=False, num_tokens=512)
