"""Reads the adapters that a server starts with, and sizes the slots for them and for later ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxserve.config import LoraConfig
from jaxserve.errors import AdapterError, LaunchError
from jaxserve.lora.delta import AdapterDelta
from jaxserve.lora.pool import LoraPoolLayout
from jaxserve.lora.reader import AdapterReader, SlotReader
from jaxserve.runner_protocol import LoadedAdapter


class StartupAdapters(NamedTuple):
    """The adapters of `--lora-paths`.

    Attributes:
        layout: layout of the LoRA pool.
        reader: reads adapters that are loaded later.
        by_name: the adapters in host memory, by name.
    """

    layout: LoraPoolLayout
    reader: SlotReader
    by_name: Mapping[str, LoadedAdapter]


def read_startup_adapters(config: LoraConfig, reader: AdapterReader, rank_multiple: int) -> StartupAdapters:
    """Read the adapters of `--lora-paths`; settings that are not given are derived from them.

    Args:
        config: the settings.
        reader: reads adapters for the model.
        rank_multiple: see `LoraPoolLayout`.

    Raises:
        LaunchError: an adapter cannot be read or does not fit, or a module is not known.
    """
    deltas: dict[str, AdapterDelta] = {}
    for name, folder in config.paths.items():
        try:
            deltas[name] = reader.read(Path(folder))
        except AdapterError as error:
            raise LaunchError(f"--lora-paths {name}: {error}") from None
    layout = lora_pool_layout(config, reader, deltas, rank_multiple)
    slots = SlotReader(reader, layout)
    adapters: dict[str, LoadedAdapter] = {}
    for name, delta in deltas.items():
        try:
            adapters[name] = slots.fit(delta)
        except AdapterError as error:
            raise LaunchError(f"--lora-paths {name}: {error}") from None
    return StartupAdapters(layout, slots, adapters)


def lora_pool_layout(
    config: LoraConfig, reader: AdapterReader, deltas: Mapping[str, AdapterDelta], rank_multiple: int
) -> LoraPoolLayout:
    """Return a pool layout for these adapters, and for later ones of the configured rank and modules."""
    if config.target_modules is None:
        paths = {path for delta in deltas.values() for path in delta.weights}
    else:
        paths = reader.target_paths(config.target_modules)
    rank = config.max_rank or max(delta.rank for delta in deltas.values())
    return LoraPoolLayout(config.max_loras_per_batch, rank, tuple(sorted(paths)), rank_multiple)
