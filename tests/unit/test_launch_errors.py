"""Launch errors give their reason: in the launcher before the engine starts, in the layout before weights are read."""

import json
import logging
import sys
from pathlib import Path

import pytest

from jaxserve import launch
from jaxserve.arguments import parse_arguments
from jaxserve.engine.builder import build_runner
from jaxserve.errors import ExitCode, LaunchError
from tests.support.tiny import write_checkpoint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-path", "/does/not/exist"], "neither a model folder nor a .gguf file"),
        (["--model-path", "some-org/some-model"], "some-org/some-model"),
        (["--model-path", "demo", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--model-path", "demo", "--tp-size", "0"], "--tp-size must be at least 1, got 0"),
        (["--model-path", "demo", "--page-size", "48"], "--page-size must be a power of two, got 48"),
        (["--model-path", "demo", "--mem-fraction-static", "1.5"], "--mem-fraction-static"),
        (["--model-path", "demo", "--chat-template", "no-such-file"], "--chat-template no-such-file"),
        ([], "--model-path is required"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_launcher(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_launcher([*arguments, "--port", "0"], monkeypatch) == ExitCode.BAD_CONFIG
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_adapter_folder_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_checkpoint(tmp_path / "tiny")
    arguments = ["--model-path", str(model), "--port", "0", "--lora-paths", "a=/nowhere"]
    assert run_launcher(arguments, monkeypatch) == ExitCode.BAD_CONFIG
    assert "adapter /nowhere: no such folder" in capsys.readouterr().err


def run_launcher(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `python -m jaxserve.launch` in this process, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["launch", *arguments])
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    try:
        return launch.main()
    except SystemExit as error:  # argparse
        return int(error.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-running-requests", "32", "--chunked-prefill-size", "16"], r"\(16\) must be at least"),
        (["--context-length", "1024"], "--context-length 1024 is more than the 512 tokens"),
        (["--tp", "3"], "--tp-size 3 does not divide the model's 8 attention heads"),
        (["--tp", "2", "--dp", "64"], "--tp-size 2 and --dp-size 64 need 128 devices"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_contradictions_are_found_before_weights_are_read(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("the weights were read")

    model = write_checkpoint(tmp_path / "tiny")
    monkeypatch.setattr("jaxserve.engine.builder.load_weights", read)
    config = parse_arguments(["--model-path", str(model), *arguments]).engine
    with pytest.raises(LaunchError, match=message):
        build_runner(config, lambda items, *_: items)


def test_unknown_architecture_is_refused_before_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    assert run_launcher(["--model-path", str(tmp_path), "--port", "0"], monkeypatch) == ExitCode.BAD_CONFIG
    error = capsys.readouterr().err
    assert "MambaForCausalLM" in error
    assert "LlamaForCausalLM" in error
