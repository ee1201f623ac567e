"""Two processes of four CPU devices each, on loopback, as two hosts."""

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

from tests.e2e.conftest import ServerProcess
from tests.e2e.test_lifecycle import start_stream
from tests.ports import free_port


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
def two_hosts(flags: list[str], folder: Path, *, dp_size: int) -> Iterator[tuple[ServerProcess, Follower]]:
    shared = [
        *flags, "--dtype", "float32", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}",
        "--tp-size", str(8 // dp_size), "--dp-size", str(dp_size),
    ]  # fmt: skip
    leader = ServerProcess(*shared, log=folder / "host-0", devices=4)
    follower = Follower(*shared, "--node-rank", "1", log=folder / "host-1")
    try:
        yield leader.wait_ready(), follower
    finally:
        for process in (leader.process, follower.process):
            if process.poll() is None:
                process.kill()
            process.wait()


def texts(url: str) -> list[str]:
    """Greedy, seeded, and with a grammar; the last two at once."""
    bodies: list[dict[str, Any]] = [
        {"prompt": [1, 2, 3], "max_tokens": 24, "temperature": 0, "ignore_eos": True},
        {"prompt": [5, 6], "max_tokens": 24, "seed": 7, "n": 4, "top_p": 0.9, "ignore_eos": True},
        {"prompt": [9], "max_tokens": 24, "temperature": 0, "regex": "(ab|cd)+x"},
    ]
    out: list[str] = []
    for body in bodies:
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        out += [choice["text"] for choice in answer.json()["choices"]]
    return out


@pytest.fixture(scope="module")
def want(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    log = tmp_path_factory.mktemp("alone") / "log"
    alone = ServerProcess(*flags, "--dtype", "float32", log=log).wait_ready()
    out = texts(alone.url)
    assert alone.stop() == 0
    return out


def test_two_hosts_with_a_copy_each_give_the_tokens_of_one(flags: list[str], want: list[str], tmp_path: Path) -> None:
    with two_hosts(flags, tmp_path, dp_size=2) as (leader, follower):
        assert texts(leader.url) == want
        assert leader.stop() == 0
        assert follower.process.wait(20) == 0


def test_two_hosts_share_a_copy_until_one_is_lost(flags: list[str], want: list[str], tmp_path: Path) -> None:
    with two_hosts(flags, tmp_path, dp_size=1) as (leader, follower):
        assert texts(leader.url) == want
        thread, lines = start_stream(leader, 4000)
        killed = time.monotonic()
        # The engine itself, not its launcher: as when a host goes down.
        children = Path(f"/proc/{follower.process.pid}/task/{follower.process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        thread.join(10)
        assert not thread.is_alive()
        assert time.monotonic() - killed < 5
        assert '"error"' in lines[-1] or '"error"' in lines[-2]
        assert leader.process.wait(10) != 0
        assert follower.process.wait(10) != 0
