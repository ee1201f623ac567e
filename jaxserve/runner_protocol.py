"""Protocols between the engine and a model runner, on one or several hosts.

Host-only. The engine, the runner and the leader of a multi-host run implement or call these protocols.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from jaxserve.step import ConstrainedRows, Plans, StepOutput


class LoadedAdapter(NamedTuple):
    """A LoRA adapter in host memory.

    Attributes:
        leaves: arrays by path in the LoRA pool, in the shape of a slot on the device.
        digest: CRC-32 of the leaves in order.
    """

    leaves: Mapping[tuple[str, ...], np.ndarray]
    digest: int


def loaded_adapter(leaves: Mapping[tuple[str, ...], np.ndarray]) -> LoadedAdapter:
    """Create a `LoadedAdapter` from its leaves and compute the digest."""
    digest = 0
    for leaf in leaves.values():
        digest = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), digest)
    return LoadedAdapter(leaves, digest)


class RunnerAdapters(Protocol):
    """The adapters that a runner can load into slots."""

    def add_adapter(self, key: str, adapter: LoadedAdapter) -> None:
        """Keep an adapter until it is removed."""
        ...

    def remove_adapter(self, key: str) -> None:
        """Forget an adapter."""
        ...


class Pending(Protocol):
    """A step whose results are being transferred to the host."""

    def result(self) -> tuple[StepOutput | None, ...]:
        """Wait for the results and return one output per plan."""
        ...


class Forwarded(Protocol):
    """A step whose forward pass is dispatched and whose tokens are not sampled yet."""

    def sample(self, constrained: Sequence[ConstrainedRows | None]) -> Pending:
        """Dispatch the sampling program; `constrained` has one entry per plan."""
        ...


class Runner(RunnerAdapters, Protocol):
    """A model runner. It keeps the adapters whose keys appear in plans."""

    def forward(self, plans: Plans) -> Forwarded:
        """Dispatch the forward pass of a step; at least one of the plans is not None."""
        ...

    def reset(self) -> None:
        """Recreate the cache after a step raised, and run an empty step; errors of that step propagate."""
        ...
