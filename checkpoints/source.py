"""A checkpoint as named tensors. Readers know file formats, not models."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

Index: TypeAlias = tuple[slice, ...]


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file and the problem."""


def listed(problems: Sequence[str], separator: str = "; ", limit: int = 10) -> str:
    """Join the first `limit` problems, followed by the number of the remaining ones."""
    more = [f"and {len(problems) - limit} more"] * (len(problems) > limit)
    return separator.join([*problems[:limit], *more])


class TensorSource(Protocol):
    """An open checkpoint. Names and orientation are Hugging Face's, whatever the file uses."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Contents of `config.json`, or its equivalent."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """Read part of a tensor into new memory, in the file's dtype (f32 if the reader dequantises it).

        Leading rows outside the index are not read, so a large tensor can be read in parts.
        """
        ...

    def close(self) -> None:
        """Release the files."""
        ...
