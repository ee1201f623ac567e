"""Sends LoRA adapters from host 0 to the other hosts in parts, since an adapter may be larger than a message."""

from collections.abc import Generator

import numpy as np

from jaxserve.distributed.messages import AdapterBytes, AdapterLeaf, AddAdapter
from jaxserve.runner_protocol import LoadedAdapter, loaded_adapter

_PART_BYTES = 32 << 20


def adapter_messages(key: str, adapter: LoadedAdapter) -> Generator[AdapterBytes | AddAdapter, None, None]:
    """Yield the messages that send an adapter to another host, in order."""
    for array in adapter.leaves.values():
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, data.size, _PART_BYTES):
            yield AdapterBytes(data[start : start + _PART_BYTES].tobytes())
    leaves = (AdapterLeaf(path, array.shape, str(array.dtype)) for path, array in adapter.leaves.items())
    yield AddAdapter(key, tuple(leaves), adapter.digest)


class AdapterReceiver:
    """Reassembles adapters."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def take(self, data: bytes) -> None:
        """Append the next bytes."""
        self._parts.append(data)

    def finish(self, message: AddAdapter) -> LoadedAdapter:
        """Return the adapter of the received bytes."""
        data, self._parts = np.frombuffer(b"".join(self._parts), np.uint8), []
        leaves: dict[tuple[str, ...], np.ndarray] = {}
        start = 0
        for leaf in message.leaves:
            dtype = np.dtype(leaf.dtype)
            end = start + int(np.prod(leaf.shape)) * dtype.itemsize
            leaves[leaf.path] = data[start:end].view(dtype).reshape(leaf.shape)
            start = end
        adapter = loaded_adapter(leaves)
        if adapter.digest != message.digest:
            raise RuntimeError(f"the adapter {message.key!r} was corrupted in transfer")
        return adapter
