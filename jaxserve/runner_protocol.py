"""What the engine asks of a model runner, on one host or on many.

Host-only: the protocols stand below the engine, the runner and the leader of several hosts, which all implement or
call them.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from jaxserve.step import ConstrainedRows, Plans, StepOutput


class LoadedAdapter(NamedTuple):
    """A LoRA adapter in host memory.

    Attributes:
        leaves: arrays by their path in the pool, in the shape in which a slot of the device holds them.
        digest: CRC-32 of the leaves in their order.
    """

    leaves: Mapping[tuple[str, ...], np.ndarray]
    digest: int


def loaded_adapter(leaves: Mapping[tuple[str, ...], np.ndarray]) -> LoadedAdapter:
    """The adapter of these leaves, with its digest."""
    digest = 0
    for leaf in leaves.values():
        digest = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), digest)
    return LoadedAdapter(leaves, digest)


class RunnerAdapters(Protocol):
    """The adapters that a runner can put into slots."""

    def add_adapter(self, key: str, adapter: LoadedAdapter) -> None:
        """Keep an adapter until it is removed."""
        ...

    def remove_adapter(self, key: str) -> None:
        """Forget an adapter."""
        ...


class Pending(Protocol):
    """A step whose results are on their way to the host."""

    def result(self) -> tuple[StepOutput | None, ...]:
        """Wait for the results: one output per plan."""
        ...


class Forwarded(Protocol):
    """A step whose forward pass was sent and whose tokens are not sampled yet."""

    def sample(self, constrained: Sequence[ConstrainedRows | None]) -> Pending:
        """Send the sampling program; one entry per plan."""
        ...


class Runner(RunnerAdapters, Protocol):
    """A model runner. It holds the adapters whose keys appear in plans."""

    def forward(self, plans: Plans) -> Forwarded:
        """Send the forward pass of a step to the devices; at least one of the plans is not None."""
        ...

    def reset(self) -> None:
        """Make the cache anew after a step raised, and run an empty step; raises what that raises."""
        ...
