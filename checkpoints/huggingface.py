"""A Hugging Face model folder: `config.json` and one or several `.safetensors` files.

Pickle files (`.bin`, `.pt`, `.pth`, `.ckpt`) are never opened: loading one runs code from the checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from checkpoints.safetensors_file import SafetensorsFile
from checkpoints.source import CheckpointError, Index

_MAX_JSON_BYTES = 64 << 20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Raises:
        CheckpointError: the file is missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_JSON_BYTES >> 20} MiB")
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from None


class HuggingFaceCheckpoint:
    """Tensors of a model folder.

    Raises:
        CheckpointError: there is no safetensors file, or the index names files outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._config = read_json(folder / "config.json")
        self._files: list[SafetensorsFile] = []
        self._owner: dict[str, SafetensorsFile] = {}
        try:
            for path in _weight_files(folder):
                file = SafetensorsFile(path)
                self._files.append(file)
                for name in file.shapes:
                    if name in self._owner:
                        raise CheckpointError(f"{path}: tensor {name} is also in another file")
                    self._owner[name] = file
        except BaseException:
            self.close()
            raise
        self._shapes = {name: shape for file in self._files for name, shape in file.shapes.items()}

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed `config.json`."""
        return self._config

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return self._shapes

    def read(self, name: str, index: Index) -> np.ndarray:
        """Read part of a tensor."""
        return self._owner[name].read(name, index)

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted({str(name) for name in read_json(index).get("weight_map", {}).values()})
        # Hub caches contain links to blobs, so links are followed; a name that leaves the folder is rejected.
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {name!r} is not a safetensors file of this folder")
        paths = [folder / name for name in names]
    else:
        single = folder / "model.safetensors"
        paths = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing or not a regular file")
    if not paths:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
        hint = f" ({', '.join(pickles)} are pickle files, which can run code; convert them)" if pickles else ""
        raise CheckpointError(f"{folder} holds no .safetensors file{hint}")
    return paths
