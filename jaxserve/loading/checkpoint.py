"""Opens a model's checkpoint in any supported format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.gguf import GGUFCheckpoint
from checkpoints.huggingface import HuggingFaceCheckpoint, read_json
from checkpoints.orbax_io import is_orbax
from checkpoints.quantized import with_quantized_names
from checkpoints.source import CheckpointError, TensorSource
from jaxserve.errors import LaunchError


class OrbaxCheckpoint(NamedTuple):
    """A folder written by `jaxserve convert`; its weights are restored as a tree, not by name."""

    folder: Path
    config: Mapping[str, Any]

    def close(self) -> None:
        """Do nothing, since no file is open."""


def open_checkpoint(path: Path) -> TensorSource | OrbaxCheckpoint:
    """Open a model folder, an Orbax folder or a `.gguf` file.

    Raises:
        LaunchError: the checkpoint cannot be read.
    """
    try:
        if path.suffix == ".gguf":
            return GGUFCheckpoint(path)
        if is_orbax(path):
            return OrbaxCheckpoint(path, read_json(path / "config.json"))
        return with_quantized_names(HuggingFaceCheckpoint(path))
    except CheckpointError as error:
        raise LaunchError(str(error)) from None
