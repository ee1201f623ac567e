"""Two hosts, which are two processes on loopback with four CPU devices each, against one host with one device."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxserve.errors import ExitCode
from tests.e2e.conftest import ServerProcess
from tests.e2e.test_lifecycle import start_stream
from tests.e2e.test_lora import complete
from tests.support.ports import free_port
from tests.support.tiny import write_adapter, write_checkpoint


class Follower:
    """`python -m jaxserve.launch --node-rank 1`."""

    def __init__(self, *arguments: str, log: Path) -> None:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jaxserve.launch", *arguments], stdout=file, stderr=file, env=environment
            )


@contextlib.contextmanager
def two_hosts(
    flags: list[str],
    folder: Path,
    *,
    dp_size: int,
    here: list[str] | None = None,
    there: list[str] | None = None,
) -> Iterator[tuple[ServerProcess, Follower]]:
    """Start two hosts; `here` are flags that only host 0 has, `there` flags that only host 1 has."""
    shared = [
        *flags, "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}",
        "--tp-size", str(8 // dp_size), "--dp-size", str(dp_size),
        "--max-running-requests", "4", "--chunked-prefill-size", "32",  # few programs to compile
    ]  # fmt: skip
    leader = ServerProcess(*shared, *(here or []), log=folder / "host-0", devices=4)
    follower = Follower(*shared, "--node-rank", "1", *(there or []), log=folder / "host-1")
    try:
        yield leader, follower
    finally:
        for process in (leader.process, follower.process):
            if process.poll() is None:
                process.kill()
            process.wait()


def texts(url: str) -> list[str]:
    """Return texts from greedy and seeded requests, with a grammar, and with penalties and biases in a row's state."""
    bodies: list[dict[str, Any]] = [
        {"prompt": [1, 2, 3], "max_tokens": 24, "temperature": 0, "ignore_eos": True},
        {"prompt": [5, 6], "max_tokens": 24, "seed": 7, "n": 4, "top_p": 0.9, "ignore_eos": True},
        {"prompt": [9], "max_tokens": 24, "temperature": 0, "regex": "(ab|cd)+x"},
        {"prompt": [4], "max_tokens": 24, "temperature": 0, "frequency_penalty": 1.5, "logit_bias": {"65": 4}},
    ]
    out: list[str] = []
    for body in bodies:
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        out += [choice["text"] for choice in answer.json()["choices"]]
    return out


@pytest.fixture(scope="module")
def want(server: ServerProcess) -> list[str]:
    """The texts of one host with one device."""
    return texts(server.url)


@pytest.mark.slow
def test_two_hosts_with_a_copy_each_give_the_tokens_of_one(flags: list[str], want: list[str], tmp_path: Path) -> None:
    with two_hosts(flags, tmp_path, dp_size=2) as (leader, follower):
        assert texts(leader.wait_ready().url) == want
        assert leader.stop() == 0
        assert follower.process.wait(20) == 0


def test_two_hosts_share_a_replica_until_one_is_lost(flags: list[str], want: list[str], tmp_path: Path) -> None:
    """Both hosts have one adapter from the start; the files of another one are on host 0 only."""
    first, later = write_adapter(tmp_path / "first", seed=1), write_adapter(tmp_path / "root" / "later", seed=2)
    merged = ServerProcess(*flags, "--merge-lora", str(later), log=tmp_path / "merged").wait_ready()
    want_later = complete(merged, "tiny")
    merged.stop()
    lora = ["--lora-paths", f"first={first}", "--max-loras-per-batch", "2"]
    here = ["--lora-root", str(tmp_path / "root")]
    with two_hosts([*flags, *lora], tmp_path, dp_size=1, here=here) as (leader, follower):
        assert texts(leader.wait_ready().url) == want
        first_text = complete(leader, "first")
        body = {"lora_name": "later", "lora_path": "later"}
        assert httpx.post(f"{leader.url}/load_lora_adapter", json=body, timeout=60).status_code == 200
        assert complete(leader, "later") == want_later != first_text
        assert complete(leader, "first") == first_text
        thread, lines = start_stream(leader, 4000)
        killed = time.monotonic()
        kill_engine(follower.process.pid)
        thread.join(10)
        assert not thread.is_alive()
        assert time.monotonic() - killed < 5
        assert '"error"' in lines[-1] or '"error"' in lines[-2]
        assert leader.process.wait(10) == ExitCode.ENGINE_LOST
        assert follower.process.wait(10) == ExitCode.ENGINE_LOST


def kill_engine(launcher: int) -> None:
    """Kill the engine of a launcher, not the launcher."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)


def test_a_host_with_another_model_is_refused_with_a_reason(flags: list[str], tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", vocab_size=264)
    with two_hosts(flags, tmp_path, dp_size=1, there=["--model-path", str(other)]) as (leader, follower):
        assert follower.process.wait(60) == ExitCode.BAD_CONFIG
        assert leader.process.wait(10) == ExitCode.BAD_CONFIG
    for log in (leader.log, follower.log):
        assert "the model differs from host 0's (config or weights)" in log.read_text()


@pytest.mark.slow
def test_losing_host_0_ends_the_other_hosts(flags: list[str], tmp_path: Path) -> None:
    with two_hosts(flags, tmp_path, dp_size=2) as (leader, follower):
        leader.wait_ready()
        kill_engine(leader.process.pid)
        assert leader.process.wait(10) == ExitCode.ENGINE_LOST
        assert follower.process.wait(10) == ExitCode.ENGINE_LOST
