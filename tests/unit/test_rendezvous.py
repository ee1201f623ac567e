"""The rendezvous of hosts: those that match host 0 are accepted, all others are refused with a reason."""

import contextlib
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest

from checkpoints.adapters import AdapterTensors, PeftAdapter
from checkpoints.source import Index
from jaxserve.config import EngineConfig
from jaxserve.distributed.messages import Channel, Hello, Refused, Sampled, Welcome
from jaxserve.distributed.rendezvous import gather, hello, join, model_digest
from jaxserve.errors import LaunchError
from tests.support.ports import free_port

WAIT_S = 30.0
MODEL = "digest of a model"


def greeting(rank: int, *, num_hosts: int = 2, model: str = MODEL, **changes: Any) -> Hello:
    config = EngineConfig(
        model_path="x", nnodes=num_hosts, node_rank=rank, dist_init_addr="127.0.0.1:1", **changes
    )  # fmt: skip
    return hello(config, model)


def another_version(**versions: str) -> Hello:
    theirs = greeting(1)
    return msgspec.structs.replace(theirs, versions=theirs.versions | versions)


def connect(port: int) -> socket.socket:
    """Connect to host 0 as `join` does, with retries, since host 0 may not listen yet."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (greeting(1, model="digest of another"), "the model differs from host 0's"),
        (greeting(1, tp_size=2), "the setting tp_size is 2 there and 1 on host 0"),
        (greeting(0), "--node-rank 0 of 2 hosts"),
        (greeting(1, num_hosts=3), "--nnodes is 3 there and 2 on host 0"),
        (another_version(jaxserve="0.0.1"), r"jaxserve is 0\.0\.1 there"),
        (another_version(libtpu="0.0.1"), r"libtpu is 0\.0\.1 there"),
    ],
)
def test_a_host_that_does_not_fit_is_refused(theirs: Hello, reason: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor() as pool:
        there = pool.submit(join, theirs, address, WAIT_S)
        with pytest.raises(LaunchError, match=reason):
            gather(greeting(0), address, WAIT_S)
        with pytest.raises(LaunchError, match=f"host 0 refused this host: .*{reason}"):
            there.result()


def test_what_may_differ_between_hosts_is_not_asked() -> None:
    address = f"127.0.0.1:{free_port()}"
    theirs = greeting(1, max_queued_requests=3, schedule_policy="lpm", log_level="debug", download_dir="/x")
    with ThreadPoolExecutor() as pool:
        there = pool.submit(join, theirs, address, WAIT_S)
        [channel] = gather(greeting(0), address, WAIT_S)
        there.result().close()
        channel.close()


def test_rendezvous_ignores_invalid_connections() -> None:
    """Connections that send anything but a greeting change nothing."""
    port = free_port()

    def strangers() -> Channel:
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\x00\x00\x00\x01\x00"):
            with connect(port) as connection, contextlib.suppress(OSError):  # refused before everything is sent
                connection.sendall(noise)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)
        with connect(port) as connection:
            Channel(connection).send(Sampled(0, 0))
            return join(greeting(1), f"127.0.0.1:{port}", WAIT_S)

    with ThreadPoolExecutor() as pool:
        there = pool.submit(strangers)
        [channel] = gather(greeting(0), f"127.0.0.1:{port}", WAIT_S)
        there.result().close()
        channel.close()


def test_a_host_with_other_messages_gets_a_reason() -> None:
    port = free_port()

    def others() -> object:
        other_version = Channel(connect(port))
        other_version.send({"type": "Hello", "rank": 1, "settings": "a digest, as it once was"})
        answer = other_version.receive_from_leader()
        other_version.close()
        join(greeting(1), f"127.0.0.1:{port}", WAIT_S).close()
        return answer

    with ThreadPoolExecutor() as pool:
        there = pool.submit(others)
        [channel] = gather(greeting(0), f"127.0.0.1:{port}", WAIT_S)
        channel.close()
        answer = there.result()
    assert isinstance(answer, Refused)
    assert "another version than jaxserve" in answer.reason


def test_of_two_hosts_of_one_rank_the_first_stays_while_it_lives() -> None:
    address = f"127.0.0.1:{free_port()}"
    port = int(address.rpartition(":")[2])

    def others() -> list[Channel]:
        with connect(port) as gone:
            Channel(gone).send(greeting(1, num_hosts=3))
        # The host was restarted and connects again.
        again = Channel(connect(port))
        again.send(greeting(1, num_hosts=3))
        with pytest.raises(LaunchError, match="--node-rank 1 is already taken by another host"):
            join(greeting(1, num_hosts=3), address, WAIT_S)
        third = join(greeting(2, num_hosts=3), address, WAIT_S)
        assert again.receive_from_leader() == Welcome()
        return [again, third]

    with ThreadPoolExecutor() as pool:
        there = pool.submit(others)
        channels = gather(greeting(0, num_hosts=3), address, WAIT_S)
        assert len(channels) == 2
        for channel in (*channels, *there.result()):
            channel.close()


def test_hosts_that_do_not_come_are_named() -> None:
    with pytest.raises(LaunchError, match=r"rank \[1\] did not connect in time"):
        gather(greeting(0), f"127.0.0.1:{free_port()}", 0.2)
    with pytest.raises(LaunchError, match="host 0 cannot be reached"):
        join(greeting(1), f"127.0.0.1:{free_port()}", 0.2)


class Tensors:
    """A checkpoint in memory."""

    config: Mapping[str, Any] = {}

    def __init__(self, **tensors: np.ndarray) -> None:
        self._tensors = tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        return self._tensors[name][index]

    def close(self) -> None:
        pass


def test_model_digests_depend_on_config_names_shapes_and_values() -> None:
    ones = np.ones((2, 3), np.float32)
    models = [
        ({"hidden_size": 3}, Tensors(a=ones)),
        ({"hidden_size": 4}, Tensors(a=ones)),
        ({"hidden_size": 3}, Tensors(b=ones)),
        ({"hidden_size": 3}, Tensors(a=ones.T)),
        ({"hidden_size": 3}, Tensors(a=ones * 2)),
        ({"hidden_size": 3}, None),
    ]
    digests = [model_digest(config, source) for config, source in models]
    adapters = [
        PeftAdapter(None, {name: AdapterTensors(ones, ones, scale)})
        for name, scale in (("a", 1.0), ("b", 1.0), ("a", 2.0))
    ]
    digests += [model_digest(*models[0], [adapter]) for adapter in adapters]
    assert len(set(digests)) == len(models) + len(adapters)
    assert digests[0] == model_digest({"hidden_size": 3}, Tensors(a=ones.copy()))
