"""Registry of the LoRA adapters that requests can name: those given at startup and those loaded at runtime."""

import asyncio
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from jaxserve.config import LoraConfig, adapter_name_problem
from jaxserve.engine.client import EngineClient
from jaxserve.errors import AdapterError, LaunchError, NotFoundError
from jaxserve.request import AdapterSource

# Files in one adapter's folder; PEFT writes three, Orbax a few dozen.
_MAX_FILES = 1000


@dataclass(frozen=True)
class NamedAdapter:
    """A loaded adapter.

    Attributes:
        key: the engine's name for the adapter.
        path: the path as the user gave it.
        pinned: whether the adapter is exempt from eviction.
    """

    key: str
    path: str
    pinned: bool


class AdapterRegistry:
    """The loaded adapters by name.

    Args:
        client: the engine client.
        config: LoRA settings given at startup; None if the server runs without LoRA.
        root: the folder from which adapters may be loaded at runtime; None forbids loading.
        reserved: names of the model itself, which no adapter may have.

    Raises:
        LaunchError: an adapter in `config` has a reserved name.
    """

    def __init__(
        self, client: EngineClient, config: LoraConfig | None, root: Path | None, reserved: Collection[str]
    ) -> None:
        self._client = client
        self._config = config
        self._root = None if root is None else root.resolve()
        self._reserved = reserved
        self._adapters: dict[str, NamedAdapter] = {}
        if config is not None:
            if taken := [name for name in config.paths if name in reserved]:
                raise LaunchError(f"--lora-paths: {taken[0]!r} is a name of the model itself")
            self._adapters = {
                name: NamedAdapter(name, path, name in config.pinned) for name, path in config.paths.items()
            }
        # Whether each adapter that is being loaded (by name) or unloaded (by key) is pinned. Both need a slot.
        self._loading: dict[str, bool] = {}
        self._unloading: dict[str, bool] = {}
        self._num_loads = 0

    @property
    def by_name(self) -> Mapping[str, NamedAdapter] | None:
        """A read-only view of the adapters in load order; None if the server runs without LoRA."""
        return None if self._config is None else MappingProxyType(self._adapters)

    async def load(self, name: str, path: str, *, pinned: bool) -> None:
        """Load an adapter; requests may name it once this returns.

        Raises:
            AdapterError: the name, the path or the adapter is not valid, or no slot is left; nothing has changed.
            UnavailableError: the engine is not available.
        """
        config = self._require_config()
        self._check_name(name)
        self._check_slots(config, pinned=pinned)
        self._num_loads += 1
        key = f"{name}:{self._num_loads}"  # names contain no colon
        self._loading[name] = pinned
        try:
            folder = await asyncio.to_thread(confined, path, self._root)
            await self._client.load_adapter(AdapterSource(key=key, folder=str(folder), pinned=pinned))
        except AdapterError as error:
            # Clients must not learn where the root is.
            raise AdapterError(str(error).replace(f"{self._root}/", ""), param=error.param) from None
        finally:
            del self._loading[name]
        self._adapters[name] = NamedAdapter(key, path, pinned)

    async def unload(self, name: str) -> None:
        """Hide an adapter from new requests immediately, then wait for the last request that uses it to end.

        Raises:
            AdapterError: the adapter is not loaded.
            UnavailableError: the engine is not available.
        """
        self._require_config()
        adapter = self._adapters.pop(name, None)
        if adapter is None:
            raise AdapterError(f"the adapter {name!r} is not loaded", param="lora_name")
        self._unloading[adapter.key] = adapter.pinned
        try:
            await self._client.unload_adapter(adapter.key)
        finally:
            del self._unloading[adapter.key]

    def check_loaded(self, key: str) -> None:
        """Raise NotFoundError if an adapter was unloaded after its name was looked up."""
        if key and not any(adapter.key == key for adapter in self._adapters.values()):
            raise NotFoundError("the adapter has just been unloaded", param="model", code="adapter_not_found")

    def _require_config(self) -> LoraConfig:
        if self._config is None:
            raise AdapterError("the server runs without LoRA; start it with --enable-lora or --lora-paths")
        return self._config

    def _check_name(self, name: str) -> None:
        if (problem := adapter_name_problem(name)) is not None:
            raise AdapterError(problem, param="lora_name")
        if name in self._reserved:
            raise AdapterError(f"{name!r} is a name of the model itself", param="lora_name")
        if name in self._adapters or name in self._loading:
            raise AdapterError(f"the adapter {name!r} is already loaded; unload it first", param="lora_name")

    def _check_slots(self, config: LoraConfig, *, pinned: bool) -> None:
        pins = [pinned, *self._loading.values(), *self._unloading.values()]
        pins += [adapter.pinned for adapter in self._adapters.values()]
        if not config.fits_slots(num_pinned=sum(pins), num_others=len(pins) - sum(pins)):
            raise AdapterError(
                f"{sum(pins)} of {len(pins)} adapters would be pinned, which leaves no free slot of "
                f"--max-loras-per-batch {config.max_loras_per_batch} to the others",
                param="pinned",
            )


def confined(path: str, root: Path | None) -> Path:
    """Resolve the real path of an adapter's folder, which must be below the root.

    Raises:
        AdapterError: the folder does not exist, has too many files, or it or one of its files is outside the root.
    """
    if root is None:
        raise AdapterError("loading adapters at runtime requires --lora-root", param="lora_path")
    outside = AdapterError(f"{path!r} is not a folder below --lora-root", param="lora_path")
    try:
        root = root.resolve(strict=True)
        folder = (root / path).resolve(strict=True)
        if folder == root or not folder.is_dir() or not folder.is_relative_to(root):
            raise outside
        for count, file in enumerate(_files(folder)):
            if count == _MAX_FILES:
                raise AdapterError(f"{path!r} has more than {_MAX_FILES} files", param="lora_path")
            if not file.resolve(strict=True).is_relative_to(root):
                raise outside
    except (OSError, ValueError, RuntimeError):  # missing file, NUL in the name, symlink loop
        raise outside from None
    return folder


def _files(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder, following symlinks; with a symlink loop the iteration does not end."""
    for path, folders, files in os.walk(folder, followlinks=True):
        yield from (Path(path) / name for name in (*folders, *files))
