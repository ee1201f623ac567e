"""The whole command without a device, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.device_check.__main__ import main
from tests.support.kernels import needs_pallas
from tests.support.tiny import write_checkpoint


@needs_pallas
def test_a_model_without_a_device(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    command = [sys.executable, "-m", "jaxserve.device_check", "--quick", "--tune", "--interpret", "tpu"]
    flags = ["--model-path", str(model), "--json", str(tmp_path / "out.json")]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_bytes())
    assert report["device"]["interpreted"]
    by_op: dict[str, set[str]] = {}
    for outcome in report["outcomes"]:
        by_op.setdefault(outcome["op"], set()).add(outcome["status"])
    assert by_op.pop("paged_attention") == by_op.pop("sampling") == by_op.pop("lora_matmul") == {"passed"}
    # The TPU runs portable XLA for the others.
    assert set().union(*by_op.values()) == {"unsupported"}
    assert [speed["op"] for speed in report["speeds"]] == ["sampling"]
    assert [step["rows"] for step in report["steps"]] == [2, 8, 32]
    assert [tuned["tried"] for tuned in report["tuned"]] == [2]
    assert "paged_attention" in done.stdout
    assert "verdict: all results are right" in done.stdout


def test_a_model_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--model-path", str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().err


def test_a_negative_number_of_repetitions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--repeats", "-1"])
    assert "--repeats must not be negative, got -1" in capsys.readouterr().err
