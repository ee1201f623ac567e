"""What hosts say to each other: msgspec structs as MessagePack, each with its length in front, over TCP.

Hosts trust their network, as JAX's own runtime does. A message is data only; nothing received is executed.
"""

import socket
import struct
import threading
from typing import Any

import msgspec
import numpy as np

from jaxserve.step import Plans

# Seconds until a host whose network says nothing at all is taken for gone; the system asks in between.
_SILENCE_S = 4
# Masks of 4096 rows over 262,144 tokens.
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
        versions: versions of the packages that compute a step; jaxserve's has a digest of its sources.
        settings: the flags that shape the step, as JSON, by name.
        model: digest of the model's config and of a sample of its weights.
    """

    rank: int
    num_hosts: int
    versions: dict[str, str]
    settings: dict[str, str]
    model: str


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """All hosts are there."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The host cannot take part."""

    reason: str


class MinOverHosts(msgspec.Struct, frozen=True, tag=True):
    """A host has come to a point where all wait for each other; from host 0: all have.

    Attributes:
        value: the host's value; from host 0 the smallest of all.
    """

    value: int


class Forward(msgspec.Struct, frozen=True, tag=True):
    """Send the forward pass of the `step`-th step."""

    step: int
    plans: Plans


class ConstrainedBits(msgspec.Struct, frozen=True):
    """`ConstrainedRows` as bytes: C rows of i32 words."""

    rows: tuple[int, ...]
    bits: bytes

    def bits_CW(self) -> np.ndarray:
        """The masks."""
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
    """Keep a LoRA adapter, for steps to load. The leaves' bytes came before, one after the other."""

    key: str
    leaves: tuple[AdapterLeaf, ...]
    digest: int


class RemoveAdapter(msgspec.Struct, frozen=True, tag=True):
    """Keep it no longer."""

    key: str


class Sample(msgspec.Struct, frozen=True, tag=True):
    """Send the draws of the step that was forwarded last."""

    constrained: tuple[ConstrainedBits | None, ...]


class Reset(msgspec.Struct, frozen=True, tag=True):
    """Make cache and state anew, and run an empty step; it counts as the `step`-th."""

    step: int


class Finish(msgspec.Struct, frozen=True, tag=True):
    """The run is over."""


class Sampled(msgspec.Struct, frozen=True, tag=True):
    """Digest of the tokens that a host has for a step."""

    step: int
    digest: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A step raised on a host, which waits for `Reset` now."""

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

    Methods raise `ConnectionError` when the other end is gone or says what is no message. Any thread may send; one
    receives.
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
        """Send what `encode` made."""
        with self._sending:
            self._socket.sendall(data)

    def receive_from_leader(self) -> FromLeader:
        """Wait for a message of host 0."""
        return self._decode(_from_leader)

    def receive_from_follower(self) -> FromFollower:
        """Wait for a message of another host."""
        return self._decode(_from_follower)

    def hung_up(self) -> bool:
        """Whether the other end is gone; for one that has nothing to say now."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Hang up."""
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
                raise ConnectionError("the other host hung up")
            data += part
        return bytes(data)


def encode(message: Any) -> bytes:
    """A message as it travels."""
    data = _encoder.encode(message)
    return _HEADER.pack(len(data)) + data
