"""`python -m jaxserve.plan`, as a user calls it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from jaxserve.errors import LaunchError
from jaxserve.targets import parse_target, target_devices
from tests.compile.models import DEEPSEEK_V31, LLAMA33_70B, QWEN3_4B, QWEN3_30B_A3B_FP8

# Two forward programs and one of draws.
SMALL = ("--max-running-requests", "8", "--chunked-prefill-size", "32")
needs_compilers = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")


def plan(model: dict[str, Any], folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    config = folder / "config.json"
    config.write_text(json.dumps(model))
    return subprocess.run(
        [sys.executable, "-m", "jaxserve.plan", "--model-path", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "XLA_FLAGS": "", **environment},
    )


@needs_compilers
def test_a_model_that_fits(tmp_path: Path) -> None:
    done = plan(QWEN3_4B, tmp_path, "--target", "v6e:2x4", "--dp", "2", "--context-length", "16384", *SMALL)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert re.search(r"target +v6e:2x4, 8 devices: tp 4, dp 2", out)
    assert re.search(r"fits +yes", out)
    assert re.search(r"attention +tpu", out)
    assert re.search(r"forward 32 tokens, 8 rows .* 2  73 all-reduce", out)
    assert re.search(r"decode bound .*tokens/s", out)
    assert "measured" not in out


@needs_compilers
def test_a_model_that_does_not_fit(tmp_path: Path) -> None:
    done = plan(LLAMA33_70B, tmp_path, "--target", "v5e:2x2", "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"] is False
    assert report["programs"] == []
    assert report["memory"]["weights"] > report["memory"]["total"]
    assert "--tp-size 16" in report["advice"][0]


@pytest.mark.parametrize(
    ("model", "target", "flags"),
    [
        # 144 blocks of its dense MLP's rows are no multiple of 32 devices.
        (DEEPSEEK_V31, "v5e:2x2", "no number of them that divides the model is enough"),
        (DEEPSEEK_V31, "v5p:2x2x1", "try --tp-size 16 or"),
        # Experts of six blocks cannot be cut in four.
        (QWEN3_30B_A3B_FP8, "v5e:1x1", "try --tp-size 4 --ep-size 4 or"),
    ],
)
def test_advice_knows_blocks_and_experts(model: dict[str, Any], target: str, flags: str, tmp_path: Path) -> None:
    done = plan(model, tmp_path, "--target", target, "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ep_size"] == 1
    assert flags in report["advice"][0]


@needs_compilers
def test_a_context_that_does_not_fit(tmp_path: Path) -> None:
    long = QWEN3_4B | {"max_position_embeddings": 1 << 20}
    arguments = ("--target", "v5e:1x1", "--context-length", str(1 << 20), "--json", *SMALL)
    done = plan(long, tmp_path, *arguments)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert "the pool holds no request of 1,048,576 tokens" in report["advice"][0]
    assert 0 < report["kv_tokens"] < 1 << 20


def test_cpu(tmp_path: Path) -> None:
    small = QWEN3_4B | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    done = plan(small, tmp_path, "--target", "cpu:2", "--json", "--context-length", "512", *SMALL)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["attention_backend"] == "xla"
    assert report["tp_size"] == 2
    assert report["bounds"] is None
    forward = report["programs"][0]
    assert forward["collectives"]["all-reduce"] == 2 * 2 + 1


def test_a_target_whose_memory_is_not_known(tmp_path: Path) -> None:
    """A context that the pool of a CPU does not hold is told of, without advice on devices."""
    small = QWEN3_4B | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    long = small | {"max_position_embeddings": 1 << 20}
    done = plan(long, tmp_path, "--target", "cpu:1", "--json", *SMALL)
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
def test_what_cannot_be_planned(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = plan(QWEN3_4B, tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**_: str) -> None:
        raise RuntimeError("Unknown backend: tpu")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(LaunchError, match=r'pip install "jaxserve\[plan\]"'):
        target_devices(parse_target("v6e:2x4"))


@needs_compilers
def test_gpu_kernels_keep_to_registers_and_use_the_tensor_cores(tmp_path: Path) -> None:
    """By what the assembler says of each kernel of a step, and by its machine code."""
    dump = tmp_path / "dump"
    dump.mkdir()
    environment = {"MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    lora = ("--enable-lora", "--max-lora-rank", "16", "--lora-target-modules", "all")
    flags = ("--target", "h100:1", "--json", "--context-length", "8192", *SMALL, *lora)
    done = plan(QWEN3_4B, tmp_path, *flags, **environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    # A second product for each of seven modules and the head, and five first ones: q, k, v and gate, up share theirs.
    assert [program["kernels"] for program in report["programs"]] == [3, 2, 3 + 13, 2 + 13, 3]
    assert report["memory"]["adapters"] > 0
    tensor_core = {}
    for assembled in dump.glob("*.ptxas"):
        text = assembled.read_text()
        spilled = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", text)
        assert spilled, f"{assembled.name}: {text}"
        assert set(spilled) == {"0"}, f"{assembled.name}: {text}"
        code = assembled.with_suffix(".sass_ctrl").read_text()
        assert not re.search(r"\b(LDL|STL)\b", code), assembled.name
        tensor_core[assembled.stem] = code.count("HGMMA")
    names = {name.rsplit("_", 1)[0] for name in tensor_core}
    assert names >= {"kv_update", "paged_decode", "paged_prefill", "lora_shrink", "lora_expand"}
    for name, count in tensor_core.items():
        assert (count > 0) == name.startswith(("paged", "lora")), name
