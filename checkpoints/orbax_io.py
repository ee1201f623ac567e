"""Orbax folders: a parameter tree, besides the small files of the model folder.

config.json, tokenizer files      as in a Hugging Face folder
jaxserve.json                     description of the weights (`Manifest`)
weights/                          the tree, written and restored by Orbax
"""

from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import orbax.checkpoint as ocp

from checkpoints.source import CheckpointError

_MANIFEST = "jaxserve.json"
_WEIGHTS = "weights"
_FORMAT = "orbax-stacked"


class _HasFormat(Protocol):
    @property
    def format(self) -> str: ...


M = TypeVar("M", bound=_HasFormat)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Describes the contents of an Orbax folder.

    Attributes:
        architecture: Hugging Face class name.
        dtype: dtype of the weights.
        source: human-readable origin of the weights.
        format: layout of the tree: layers stacked along the first axis.
    """

    architecture: str
    dtype: str
    source: str
    format: str = _FORMAT


def is_orbax(folder: Path) -> bool:
    """Return whether a folder was written by `save`."""
    return (folder / _MANIFEST).is_file()


def save(folder: Path, weights: Any, manifest: Manifest) -> None:
    """Write the tree into an existing folder, and then the manifest, whose presence marks the folder as complete."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / _WEIGHTS, weights)
    (folder / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))


def restore(folder: Path, abstract: Any) -> Any:
    """Read the tree directly into the shape, dtype and sharding of `abstract` (jax.ShapeDtypeStruct leaves).

    Raises:
        CheckpointError: the folder does not contain that tree.
    """
    read_manifest(folder / _MANIFEST, Manifest, _FORMAT)
    return restore_tree(folder / _WEIGHTS, abstract)


def read_manifest(path: Path, kind: type[M], supported: str) -> M:
    """Read a manifest whose `format` must be the supported one.

    Raises:
        CheckpointError: the manifest is broken, or has another format.
    """
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if manifest.format != supported:
        raise CheckpointError(f"{path}: format {manifest.format!r} is not supported; only {supported} is")
    return manifest


def restore_tree(folder: Path, abstract: Any) -> Any:
    """Read a tree that Orbax wrote; see `restore`.

    Raises:
        CheckpointError: the folder does not contain that tree.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.resolve(), abstract)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise CheckpointError(f"{folder}: {error}") from None
