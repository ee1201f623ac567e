"""Orbax folders: a parameter tree beside the model folder's own small files.

config.json, tokenizer files      as in a Hugging Face folder
jaxserve.json                     what the weights are (`Manifest`)
weights/                          the tree, written and restored by Orbax
"""

from pathlib import Path
from typing import Any

import msgspec
import orbax.checkpoint as ocp

from checkpoints.source import CheckpointError

_MANIFEST = "jaxserve.json"
_WEIGHTS = "weights"
_FORMAT = "orbax-stacked"


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an Orbax folder holds.

    Attributes:
        architecture: Hugging Face class name.
        dtype: of the weights.
        source: what it was made from, for people.
        format: layout of the tree: layers stacked along the first axis.
    """

    architecture: str
    dtype: str
    source: str
    format: str = _FORMAT


def is_orbax(folder: Path) -> bool:
    """Whether a folder was written by `save`."""
    return (folder / _MANIFEST).is_file()


def save(folder: Path, weights: Any, manifest: Manifest) -> None:
    """Write the tree and its manifest into an existing folder; the manifest comes last, so it marks a whole one."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / _WEIGHTS, weights)
    (folder / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))


def restore(folder: Path, abstract: Any) -> Any:
    """Read the tree straight into the shape, dtype and sharding of `abstract` (jax.ShapeDtypeStruct leaves).

    Raises:
        CheckpointError: the folder does not hold that tree.
    """
    try:
        manifest = msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{folder / _MANIFEST}: {error}") from None
    if manifest.format != _FORMAT:
        raise CheckpointError(f"{folder / _MANIFEST}: format {manifest.format!r} is not supported; only {_FORMAT} is")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.resolve() / _WEIGHTS, abstract)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise CheckpointError(f"{folder / _WEIGHTS}: {error}") from None
