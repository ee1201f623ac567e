"""The choice of attention and sampling backends for a device, and the reasons reported for it."""

import logging
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import LaunchError
from jaxserve.layout.layout import layout_engine, layout_model
from jaxserve.parallel.mesh import make_mesh
from kernels_pallas.dispatch import choose_attention, choose_sampler
from kernels_pallas.paged_attention.cases import SHAPES
from kernels_pallas.paged_attention.xla.backend import XlaAttention
from tests.support.tiny import CONFIG

DENSE = SHAPES["decode"].config(jnp.dtype(jnp.float32))


@pytest.mark.parametrize(("name", "reason"), [("auto", "native to cpu"), ("xla", "requested")])
def test_a_cpu_takes_the_portable_one(name: Any, reason: str) -> None:
    chosen = choose_attention(name, DENSE, make_mesh(1))
    assert isinstance(chosen.impl, XlaAttention)
    assert (chosen.name, chosen.reason, chosen.is_fallback) == ("xla", reason, False)


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_a_named_backend_is_not_replaced(name: Any) -> None:
    with pytest.raises(NotImplementedError, match=f"the {name} kernels do not run on cpu devices"):
        choose_attention(name, DENSE, make_mesh(1))
    config = EngineConfig(model_path="x", attention_backend=name, max_total_tokens=1024)
    with pytest.raises(LaunchError, match=f"--attention-backend {name}: the {name} kernels do not run on cpu"):
        layout_engine(config, layout_model(config, CONFIG, make_mesh(1)), 0)


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(model_path="x", max_total_tokens=1024)
    with caplog.at_level(logging.INFO, "jaxserve.layout.backends"):
        layout_engine(config, layout_model(config, CONFIG, make_mesh(1)), 0)
    assert [record.message for record in caplog.records] == [
        "attention backend: xla, native to cpu",
        "sampling backend: xla, native to cpu",
    ]


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA GeForce RTX 4090"])
def test_other_gpus_than_hopper_take_the_portable_ones_and_say_why(kind: str) -> None:
    device = SimpleNamespace(platform="gpu", device_kind=kind)
    mesh: Any = SimpleNamespace(devices=np.array([device]), shape={"data": 1, "model": 1})
    for chosen in (choose_attention("auto", DENSE, mesh), choose_sampler(mesh)):
        assert (chosen.name, chosen.is_fallback) == ("xla", True)
        assert chosen.reason.startswith("the gpu kernel does not support it: ")
        if jax.__version_info__ >= (0, 11):
            assert f"not {kind}" in chosen.reason
    with pytest.raises(NotImplementedError):
        choose_attention("gpu", DENSE, mesh)
