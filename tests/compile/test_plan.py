"""The command `python -m jaxserve.plan`: its reports, its advice and its errors."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from jax.experimental import topologies

from jaxserve.errors import LaunchError
from jaxserve.plan.__main__ import main
from jaxserve.plan.compile import Outcome
from jaxserve.plan.targets import parse_target, target_devices
from tests.compile.models import DEEPSEEK_V31, LLAMA33_70B, QWEN3_4B, QWEN3_30B_A3B_FP8

# Two forward programs and one for sampling.
SMALL = ("--max-running-requests", "8", "--chunked-prefill-size", "32")
SMALLEST = ("--max-running-requests", "8", "--chunked-prefill-size", "8")
TINY = QWEN3_4B | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
needs_compilers = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")


class Done(NamedTuple):
    """The exit code and the output of one call of the command."""

    returncode: int
    stdout: str
    stderr: str


Plan = Callable[..., Done]


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A function that runs the command in this process."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)

    def plan(model: dict[str, Any], *arguments: str) -> Done:
        (tmp_path / "config.json").write_text(json.dumps(model))
        try:
            code = main(["--model-path", str(tmp_path), *arguments])
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        return Done(code, *capsys.readouterr())

    return plan


def test_the_command(tmp_path: Path) -> None:
    """`python -m jaxserve.plan` runs in its own process, on the devices that it asks JAX for."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    arguments = ("--target", "cpu:2", "--json", "--context-length", "512", *SMALL)
    command = [sys.executable, "-m", "jaxserve.plan", "--model-path", str(tmp_path), *arguments]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["attention_backend"] == "xla"
    assert report["tp_size"] == 2
    assert report["bounds"] is None
    assert report["programs"][0]["collectives"]["all-reduce"] == 2 * 2 + 1


@needs_compilers
def test_a_model_that_fits(plan: Plan) -> None:
    done = plan(QWEN3_4B, "--target", "v6e:2x4", "--dp", "2", "--context-length", "16384", *SMALL)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert re.search(r"target +v6e:2x4, 8 devices: tp 4, dp 2", out)
    assert re.search(r"fits +yes", out)
    assert re.search(r"attention +tpu", out)
    assert re.search(r"forward 32 tokens, 8 rows .* 2 +73 all-reduce", out)
    assert re.search(r"decode bound .*tokens/s", out)
    assert "measured" not in out


@needs_compilers
def test_a_model_that_does_not_fit(plan: Plan) -> None:
    done = plan(LLAMA33_70B, "--target", "v5e:2x2", "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"] is False
    assert report["programs"] == []
    assert report["memory"]["weights"] > report["memory"]["total"]
    assert "--tp-size 16" in report["advice"][0]


@pytest.mark.parametrize(
    ("model", "target", "flags"),
    [
        # The 144 blocks of its dense MLP's rows are no multiple of 32 devices.
        (DEEPSEEK_V31, "v5e:2x2", "no number of them that divides the model is enough"),
        (DEEPSEEK_V31, "v5p:2x2x1", "try --tp-size 16 or"),
        # Experts of six blocks cannot be split over four devices.
        (QWEN3_30B_A3B_FP8, "v5e:1x1", "try --tp-size 4 --ep-size 4 or"),
    ],
)
def test_plan_advice_respects_blocks_and_experts(model: dict[str, Any], target: str, flags: str, plan: Plan) -> None:
    done = plan(model, "--target", target, "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ep_size"] == 1
    assert flags in report["advice"][0]


@needs_compilers
def test_a_context_that_does_not_fit(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    # The pool is sized before a program is compiled.
    monkeypatch.setattr("jaxserve.plan.compile._compile", lambda *_: Outcome([], 0.0, {}))
    long = QWEN3_4B | {"max_position_embeddings": 1 << 20}
    arguments = ("--target", "v5e:1x1", "--context-length", str(1 << 20), "--json", *SMALL)
    done = plan(long, *arguments)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert "the pool holds no request of 1,048,576 tokens" in report["advice"][0]
    assert 0 < report["kv_tokens"] < 1 << 20


def test_a_target_whose_memory_is_not_known(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context that does not fit a CPU's page pool is reported, without advice on devices."""
    monkeypatch.setattr("jaxserve.plan.compile._compile", lambda *_: Outcome([], 0.0, {}))
    long = TINY | {"max_position_embeddings": 1 << 20}
    done = plan(long, "--target", "cpu:8", "--tp", "1", "--json", *SMALLEST)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["full_requests"] == 0
    assert len(report["advice"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "v9:2x2"), "unknown device 'v9'; known: v5e, v5p, v6e, tpu7x, h100, h200, b200, cpu"),
        (("--target", "v6e"), "expected a number of devices such as v6e:2x2"),
        (("--target", "h100:2x2"), "expected a number of devices such as h100:8"),
        (("--target", "cpu:8", "--tp", "3"), "--tp-size 3 does not divide the model's 32 attention heads"),
        (("--target", "cpu:8", "--tp", "4", "--dp", "4"), "need 16 devices, --target cpu:8 has 8"),
        (("--target", "cpu:8", "--dp", "9"), "--dp-size must be between 1 and the target's 8 devices, got 9"),
    ],
)
def test_what_cannot_be_planned(arguments: tuple[str, ...], message: str, plan: Plan) -> None:
    done = plan(QWEN3_4B, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**_: str) -> None:
        raise RuntimeError("Unknown backend: tpu")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(LaunchError, match=r'pip install "jaxserve\[plan\]"'):
        target_devices(parse_target("v6e:2x4"))


@needs_compilers
@pytest.mark.slow
def test_programs_of_adapters(plan: Plan) -> None:
    lora = ("--enable-lora", "--max-lora-rank", "16", "--lora-target-modules", "all")
    done = plan(QWEN3_4B, "--target", "h100:1", "--json", "--context-length", "8192", *SMALL, *lora)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    # Expand kernels of seven modules and the head; shrink kernels of q, k, v, of o, of gate, up, of down, of the head.
    assert [program["kernels"] for program in report["programs"]] == [3, 2, 3 + 13, 2 + 13, 3]
    assert report["memory"]["adapters"] > 0
