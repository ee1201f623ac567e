"""Two processes of four CPU devices each, on loopback, as two hosts."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxserve.config import EngineConfig
from jaxserve.distributed.messages import Channel, Drawn
from jaxserve.distributed.rendezvous import gather, hello, join
from jaxserve.errors import LaunchError
from tests.e2e.conftest import ServerProcess
from tests.e2e.test_lifecycle import start_stream


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def test_two_hosts_give_the_tokens_of_one(flags: list[str], tmp_path: Path) -> None:
    alone = ServerProcess(*flags, "--dtype", "float32", log=tmp_path / "alone").wait_ready()
    want = texts(alone.url)
    assert alone.stop() == 0
    with two_hosts(flags, tmp_path, dp_size=4) as (leader, follower):
        assert texts(leader.url) == want
        assert leader.stop() == 0
        assert follower.process.wait(20) == 0


def test_a_lost_host_ends_all(flags: list[str], tmp_path: Path) -> None:
    with two_hosts(flags, tmp_path, dp_size=4) as (leader, follower):
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


def settings(**changes: Any) -> EngineConfig:
    return EngineConfig(model_path="x", nnodes=2, dist_init_addr="127.0.0.1:1", **changes)


MODEL = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64}


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (hello(settings(node_rank=1), MODEL | {"hidden_size": 32}, {}), "the model is another one"),
        (hello(settings(node_rank=1), MODEL, {"a": (1,)}), "the model is another one"),
        (hello(settings(node_rank=1, tp_size=2), MODEL, {}), "the flags that shape a step differ"),
        (hello(settings(node_rank=0), MODEL, {}), "--node-rank 0 of 2 hosts"),
        (
            hello(EngineConfig(model_path="x", nnodes=3, node_rank=1, dist_init_addr="x:1"), MODEL, {}),
            "--nnodes is 3 there and 2 on host 0",
        ),
    ],
)
def test_a_host_that_does_not_fit_is_refused(greeting: Any, reason: str) -> None:
    port = free_port()
    refused: list[str] = []

    def try_to_join() -> None:
        try:
            join(greeting, f"127.0.0.1:{port}", 10)
        except LaunchError as error:
            refused.append(str(error))

    thread = threading.Thread(target=try_to_join)
    thread.start()
    with pytest.raises(LaunchError, match=reason):
        gather(hello(settings(), MODEL, {}), f"127.0.0.1:{port}", 10)
    thread.join()
    assert reason in refused[0]


def test_another_version_is_refused() -> None:
    port = free_port()
    mine = hello(settings(), MODEL, {})
    theirs = hello(settings(node_rank=1), MODEL, {})
    theirs.versions["jax"] = "0.0.1"
    thread = threading.Thread(target=_join_quietly, args=(theirs, port))
    thread.start()
    with pytest.raises(LaunchError, match=r"jax is 0\.0\.1 there"):
        gather(mine, f"127.0.0.1:{port}", 10)
    thread.join()


def _join_quietly(greeting: Any, port: int) -> None:
    with contextlib.suppress(LaunchError):
        join(greeting, f"127.0.0.1:{port}", 10)


def test_strangers_and_second_hosts_are_sent_away() -> None:
    """Whoever says what is no greeting changes nothing; of two hosts of one rank the first stays."""
    port = free_port()
    mine, theirs = hello(settings(), MODEL, {}), hello(settings(node_rank=1), MODEL, {})
    results: list[str] = []

    def strangers() -> None:
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\x00\x00\x00\x01\x00"):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(noise)
                with contextlib.suppress(OSError):  # refused already
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1)
        connection = socket.create_connection(("127.0.0.1", port))
        Channel(connection).send(Drawn(0, 0))
        channel, coordinator = join(theirs, f"127.0.0.1:{port}", 10)
        results.append(coordinator)
        channel.close()
        connection.close()

    # The listener is up once gather runs.
    thread = threading.Thread(target=lambda: (time.sleep(0.3), strangers()))
    thread.start()
    channels, coordinator = gather(mine, f"127.0.0.1:{port}", 20)
    thread.join()
    assert len(channels) == 1
    channels[0].close()
    assert results == [coordinator]


def test_hosts_that_do_not_come_are_told_of() -> None:
    with pytest.raises(LaunchError, match=r"rank \[1\] did not come in time"):
        gather(hello(settings(), MODEL, {}), f"127.0.0.1:{free_port()}", 0.2)
    with pytest.raises(LaunchError, match="host 0 cannot be reached"):
        join(hello(settings(node_rank=1), MODEL, {}), f"127.0.0.1:{free_port()}", 0.2)
