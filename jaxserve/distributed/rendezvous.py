"""Connects the hosts and checks that they will run the same step, before any of them touches a device."""

import contextlib
import hashlib
import logging
import socket
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from checkpoints.adapters import PeftAdapter
from checkpoints.source import TensorSource
from jaxserve.config import EngineConfig
from jaxserve.distributed.messages import Channel, Hello, Refused, Welcome
from jaxserve.errors import LaunchError

logger = logging.getLogger(__name__)

# The packages that compute a step; not all of them need be installed.
_PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    *(f"jax-cuda{major}-{part}" for major in (12, 13) for part in ("plugin", "pjrt")),
)
# Settings that may differ between hosts: locations, and those that only host 0 uses.
_LOCAL_SETTINGS = (
    "model_path", "revision", "download_dir", "compilation_cache_dir", "log_level", "show_progress", "nnodes",
    "node_rank", "merge_lora", "dist_init_addr", "dist_timeout_s", "max_queued_requests", "schedule_policy",
)  # fmt: skip
_RETRY_S = 0.2
_HELLO_S = 10.0


def hello(config: EngineConfig, model: str) -> Hello:
    """Return a host's first message: its versions, its settings and its `model_digest`."""
    if config.lora is not None:  # locations of adapters may differ
        config = msgspec.structs.replace(
            config, lora=msgspec.structs.replace(config.lora, paths=dict.fromkeys(config.lora.paths, ""))
        )  # fmt: skip
    settings = {
        name: msgspec.json.encode(value).decode()
        for name, value in msgspec.structs.asdict(config).items()
        if name not in _LOCAL_SETTINGS
    }
    return Hello(
        rank=config.node_rank,
        num_hosts=config.nnodes,
        versions=_versions(),
        settings=settings,
        model=model,
    )


def _versions() -> dict[str, str]:
    root = Path(__file__).parent.parent
    sources = hashlib.sha256()
    for package in (root, root.parent / "kernels_pallas"):
        for file in sorted(package.rglob("*.py")):
            sources.update(file.read_bytes())
    versions = {"jaxserve": f"{metadata.version('jaxserve')}+{sources.hexdigest()[:12]}"}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def model_digest(
    hf_config: Mapping[str, Any], source: TensorSource | None, adapters: Iterable[PeftAdapter] = ()
) -> str:
    """Return a digest of a model.

    Args:
        hf_config: its `config.json`.
        source: its tensors, of which names, shapes and first rows are hashed; None if they cannot be read by name.
            Differences elsewhere go unnoticed: hosts would still agree on every token, but on wrong ones.
        adapters: the adapters that are merged or served.
    """
    digest = hashlib.sha256(msgspec.json.encode(hf_config, order="sorted"))
    if source is not None:
        for name, shape in sorted(source.shapes.items()):
            digest.update(f"{name}{shape}".encode())
            digest.update(source.read(name, (slice(0, 1),)).tobytes())
    for adapter in adapters:
        for name, (a_RI, b_OR, scale) in sorted(adapter.modules.items()):
            digest.update(f"{name}{scale}".encode() + a_RI.tobytes() + b_OR.tobytes())
    return digest.hexdigest()


def gather(mine: Hello, address: str, timeout_s: float) -> list[Channel]:
    """On host 0: wait for every other host, and welcome them together.

    If a host cannot take part, every host is sent the reason. The address is free when this returns: JAX's coordinator
    listens there next, so one port between hosts is enough.

    Returns:
        The channels to the other hosts, by rank from 1.

    Raises:
        LaunchError: a host cannot take part, or not all joined in time.
    """
    host, port = split_address(address)
    channels: dict[int, Channel] = {}
    deadline = time.monotonic() + timeout_s
    try:
        with _listen(host, port) as listener:
            logger.info("waiting for %d more hosts at %s", mine.num_hosts - 1, address)
            while len(channels) < mine.num_hosts - 1:
                _accept(listener, mine, channels, deadline)
        for rank, channel in channels.items():
            _welcome(rank, channel)
    except LaunchError:
        for channel in channels.values():
            channel.close()
        raise
    return [channels[rank] for rank in sorted(channels)]


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise LaunchError(f"--dist-init-addr: cannot listen on {host}:{port}: {error.strerror or error}") from None


def _welcome(rank: int, channel: Channel) -> None:
    try:
        channel.send(Welcome())
    except OSError as error:
        raise LaunchError(f"host {rank} was lost while waiting for the other hosts: {error}") from None


def _accept(listener: socket.socket, mine: Hello, channels: dict[int, Channel], deadline: float) -> None:
    """Accept the connection of one host."""
    left = deadline - time.monotonic()
    if left <= 0:
        missing = sorted(set(range(1, mine.num_hosts)) - channels.keys())
        raise LaunchError(f"hosts of rank {missing} did not connect in time")
    listener.settimeout(left)
    try:
        connection, peer = listener.accept()
    except TimeoutError:
        return
    connection.settimeout(_HELLO_S)
    channel = Channel(connection)
    try:
        theirs = channel.receive_from_follower()
    except (ConnectionError, TimeoutError) as error:
        # A host of another version, with other messages, will still understand this one.
        logger.warning("%s sent an invalid greeting: %s", peer[0], error)
        _refuse(channel, f"its greeting was not understood: another version than jaxserve {mine.versions['jaxserve']}")
        return
    connection.settimeout(None)
    if not isinstance(theirs, Hello):
        logger.warning("%s did not greet", peer[0])
        channel.close()
        return
    reason = _mismatch(mine, theirs)
    earlier = channels.get(theirs.rank)
    if reason is None and earlier is not None and earlier.hung_up():
        logger.info("host %d disconnected and joins again", theirs.rank)
        channels.pop(theirs.rank).close()
    elif reason is None and earlier is not None:
        # The first host stays, and only the second one is refused.
        logger.warning("a second host of rank %d at %s was refused", theirs.rank, peer[0])
        _refuse(channel, f"--node-rank {theirs.rank} is already taken by another host")
        return
    if reason is not None:
        for other in (channel, *channels.values()):
            _refuse(other, reason)
        raise LaunchError(f"the host at {peer[0]} cannot take part: {reason}")
    channels[theirs.rank] = channel
    logger.info("%d of %d hosts have joined", len(channels) + 1, mine.num_hosts)


def _refuse(channel: Channel, reason: str) -> None:
    with contextlib.suppress(OSError):  # a host that is gone needs no message
        channel.send(Refused(reason))
    channel.close()


def _mismatch(mine: Hello, theirs: Hello) -> str | None:
    if theirs.num_hosts != mine.num_hosts:
        return f"--nnodes is {theirs.num_hosts} there and {mine.num_hosts} on host 0"
    if not 1 <= theirs.rank < mine.num_hosts:
        return f"--node-rank {theirs.rank} of {mine.num_hosts} hosts; rank 0 is host 0 itself"
    for package in sorted(mine.versions.keys() | theirs.versions.keys()):
        own_version, their_version = mine.versions.get(package), theirs.versions.get(package)
        if own_version != their_version:
            return f"{package} is {their_version} there and {own_version} on host 0"
    if theirs.model != mine.model:
        return "the model differs from host 0's (config or weights)"
    for name, value in mine.settings.items():
        if (other := theirs.settings.get(name)) != value:
            return f"the setting {name} is {other} there and {value} on host 0"
    return None


def join(mine: Hello, address: str, timeout_s: float) -> Channel:
    """On any other host: connect to host 0 and wait until all hosts have joined.

    Returns:
        The channel to host 0.

    Raises:
        LaunchError: host 0 cannot be reached, or refuses this host.
    """
    host, port = split_address(address)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=_HELLO_S)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(f"--dist-init-addr {address}: host 0 cannot be reached: {error}") from None
            time.sleep(_RETRY_S)
    connection.settimeout(max(1.0, deadline - time.monotonic()))
    channel = Channel(connection)
    try:
        channel.send(mine)
        answer = channel.receive_from_leader()
    except (ConnectionError, TimeoutError) as error:
        channel.close()
        raise LaunchError(f"host 0 at {address} did not accept this host: {error}") from None
    connection.settimeout(None)
    if isinstance(answer, Welcome):
        return channel
    channel.close()
    if isinstance(answer, Refused):
        raise LaunchError(f"host 0 refused this host: {answer.reason}")
    raise LaunchError(f"host 0 at {address} sent an unexpected message")


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port` into host and port.

    Raises:
        LaunchError: the address has another format.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise LaunchError(f"--dist-init-addr {address}: expected host:port")
    return host.strip("[]"), int(port)
