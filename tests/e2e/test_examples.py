"""Every example runs, against the demo model or a tiny one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import ServerProcess
from tests.support.tiny import write_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
CLIENTS = ("chat", "streaming", "tools", "structured_output")


def run(*command: str, **environment: str) -> str:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(EXAMPLES.parent), "XLA_FLAGS": "", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", CLIENTS)
def test_client(demo: ServerProcess, name: str) -> None:
    assert run(sys.executable, str(EXAMPLES / f"{name}.py"), JAXSERVE_URL=demo.url).strip()


def test_every_example_is_tested() -> None:
    others = {"client.py", "reasoning.py", "lora_hot_swap.py", "offline_batch.py", "planning.sh", "README.md"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {f"{name}.py" for name in CLIENTS} | others


@pytest.fixture(scope="module")
def options_server(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the LoRA and reasoning options that two examples need."""
    folder = tmp_path_factory.mktemp("examples")
    write_adapter(folder / "adapters" / "poet")
    lora = ["--enable-lora", "--max-lora-rank", "4", "--lora-target-modules", "all-linear"]
    process = ServerProcess(
        *flags, *lora, "--lora-root", str(folder / "adapters"), "--reasoning-parser", "qwen3", log=folder / "log"
    )
    try:
        yield process.wait_ready()
    finally:
        assert process.stop() == 0


def test_lora_hot_swap(options_server: ServerProcess) -> None:
    out = run(sys.executable, str(EXAMPLES / "lora_hot_swap.py"), "poet", JAXSERVE_URL=options_server.url)
    assert "load {'example': 'poet'}" in out
    assert "unload {}" in out


def test_reasoning(options_server: ServerProcess) -> None:
    out = run(sys.executable, str(EXAMPLES / "reasoning.py"), JAXSERVE_URL=options_server.url)
    assert out.startswith("thinking: ")
    assert "\nanswer: " in out


def test_offline_batch(checkpoint: Path) -> None:
    assert run(sys.executable, str(EXAMPLES / "offline_batch.py"), str(checkpoint)).startswith(
        "The capital of France is"
    )


def test_planning(checkpoint: Path) -> None:
    assert "fits" in run(str(EXAMPLES / "planning.sh"), str(checkpoint))
