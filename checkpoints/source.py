"""A checkpoint as named tensors. Readers know file formats; they know no model."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

Index: TypeAlias = tuple[slice, ...]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and what is wrong with it."""


def listed(problems: Sequence[str], separator: str = "; ", limit: int = 10) -> str:
    """The first problems of perhaps many, and how many more there are."""
    more = [f"and {len(problems) - limit} more"] * (len(problems) > limit)
    return separator.join([*problems[:limit], *more])


class TensorSource(Protocol):
    """Open checkpoint. Names and orientation are Hugging Face's, whatever the file's own are."""

    @property
    def config(self) -> Mapping[str, Any]:
        """What `config.json` holds, or its equivalent."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """Read part of a tensor into new memory, in the file's dtype (f32 where it is quantised).

        Leading rows outside the index cost nothing, so a large tensor can be read in pieces.
        """
        ...

    def close(self) -> None:
        """Release the files."""
        ...
