"""Messages between hosts: msgspec structs as length-prefixed MessagePack over TCP.

Hosts trust their network, as JAX's own runtime does. A message is data only; nothing received is executed.
"""

import socket
import struct
import threading
from typing import Any

import msgspec
import numpy as np

from jaxserve.step import Plans

# A host that sends no packets for this many seconds is considered lost; TCP keepalive probes it meanwhile.
_SILENCE_S = 4
# Enough for the masks of 4096 rows over 262,144 tokens.
_MAX_MESSAGE_BYTES = 256 << 20
_KEEPALIVE = {
    "TCP_KEEPIDLE": 1,
    "TCP_KEEPINTVL": 1,
    "TCP_KEEPCNT": _SILENCE_S - 1,
    "TCP_USER_TIMEOUT": _SILENCE_S * 1000,
}
_HEADER = struct.Struct("!I")


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A host's first message to host 0.

    Attributes:
        rank: rank of the host.
        num_hosts: the number of hosts in the host's own flags.
        versions: versions of the packages that compute a step; jaxserve's includes a digest of its sources.
        settings: the flags that shape the step, as JSON, by name.
        model: digest of the model's config and of a sample of its weights.
    """

    rank: int
    num_hosts: int
    versions: dict[str, str]
    settings: dict[str, str]
    model: str


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """All hosts have joined."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The host is refused."""

    reason: str


class MinOverHosts(msgspec.Struct, frozen=True, tag=True):
    """A host has reached a barrier; from host 0: all hosts have.

    Attributes:
        value: the host's value; from host 0, the smallest value of all hosts.
    """

    value: int


class Forward(msgspec.Struct, frozen=True, tag=True):
    """Send the forward pass of step `step` to the devices."""

    step: int
    plans: Plans


class ConstrainedBits(msgspec.Struct, frozen=True):
    """`ConstrainedRows` as bytes: C rows of i32 words."""

    rows: tuple[int, ...]
    bits: bytes

    def bits_CW(self) -> np.ndarray:
        """Return the masks, i32[C, W]."""
        return np.frombuffer(self.bits, np.int32).reshape(len(self.rows), -1)


class AdapterBytes(msgspec.Struct, frozen=True, tag=True):
    """The next bytes of the adapter that `AddAdapter` will name."""

    data: bytes


class AdapterLeaf(msgspec.Struct, frozen=True):
    """One array of an adapter, in the layout of a LoRA pool slot."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str


class AddAdapter(msgspec.Struct, frozen=True, tag=True):
    """Keep a LoRA adapter for steps to load. The bytes of its leaves were sent before, in order."""

    key: str
    leaves: tuple[AdapterLeaf, ...]
    digest: int


class RemoveAdapter(msgspec.Struct, frozen=True, tag=True):
    """Drop a LoRA adapter."""

    key: str


class Sample(msgspec.Struct, frozen=True, tag=True):
    """Send the sampling program of the last forwarded step to the devices."""

    constrained: tuple[ConstrainedBits | None, ...]


class Reset(msgspec.Struct, frozen=True, tag=True):
    """Recreate cache and state, and run an empty step, which counts as step `step`."""

    step: int


class Finish(msgspec.Struct, frozen=True, tag=True):
    """The run is over."""


class Sampled(msgspec.Struct, frozen=True, tag=True):
    """Digest of the tokens that a host sampled in a step."""

    step: int
    digest: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A step raised on a host, which now waits for `Reset`."""

    step: int
    reason: str


FromLeader = (
    Welcome | Refused | MinOverHosts | Forward | Sample | Reset | AdapterBytes | AddAdapter | RemoveAdapter | Finish
)
FromFollower = Hello | MinOverHosts | Sampled | Failed

_encoder = msgspec.msgpack.Encoder()
_from_leader = msgspec.msgpack.Decoder(FromLeader)
_from_follower = msgspec.msgpack.Decoder(FromFollower)


class Channel:
    """One connection between two hosts.

    Methods raise `ConnectionError` when the other host is gone or sends an invalid message. Any thread may send; only
    one may receive.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # not every system has all of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._socket = connection
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Send a message."""
        self.send_encoded(encode(message))

    def send_encoded(self, data: bytes) -> None:
        """Send a message that was encoded by `encode`."""
        with self._sending:
            self._socket.sendall(data)

    def receive_from_leader(self) -> FromLeader:
        """Wait for a message from host 0."""
        return self._decode(_from_leader)

    def receive_from_follower(self) -> FromFollower:
        """Wait for a message from another host."""
        return self._decode(_from_follower)

    def hung_up(self) -> bool:
        """Return whether the other host is gone; call only while it has nothing to send."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _decode(self, decoder: Any) -> Any:
        (size,) = _HEADER.unpack(self._read(_HEADER.size))
        if size > _MAX_MESSAGE_BYTES:
            raise ConnectionError(f"a message of {size} bytes")
        try:
            return decoder.decode(self._read(size))
        except msgspec.DecodeError as error:
            raise ConnectionError(f"not a message: {error}") from None

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(min(size - len(data), 1 << 20))
            if not part:
                raise ConnectionError("the other host closed the connection")
            data += part
        return bytes(data)


def encode(message: Any) -> bytes:
    """Return the bytes that are sent for a message."""
    data = _encoder.encode(message)
    return _HEADER.pack(len(data)) + data
