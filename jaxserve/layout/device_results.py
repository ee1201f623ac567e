"""What `jaxserve.device_check` found on a kind of device: kernels that failed, and the fastest tiles.

The check writes one file per kind of device into the cache folder, and the server reads it.
"""

import functools
import importlib.metadata
import logging
import re
from pathlib import Path

import msgspec

from jaxserve.loading.hub import cache_folder
from kernels_pallas.tuning import TuningTable

logger = logging.getLogger(__name__)


class DeviceResults(msgspec.Struct, frozen=True, kw_only=True):
    """Results for a kind of device and the versions that they were found with.

    Attributes:
        device_kind: JAX's name of the kind of device.
        versions: versions of jaxlib and jaxserve.
        failed: calls that failed, by the op's name.
        tiles: the fastest tiles; see `TuningTable`.
    """

    device_kind: str
    versions: dict[str, str]
    failed: dict[str, list[str]] = {}
    tiles: dict[str, dict[str, int | bool]] = {}

    @property
    def tuning(self) -> TuningTable:
        """The tiles, as kernels look them up."""
        return TuningTable(self.tiles)


def results_path(device_kind: str) -> Path:
    """Return the file for a kind of device."""
    return cache_folder() / "device_check" / f"{re.sub(r'[^a-z0-9]+', '-', device_kind.lower()).strip('-')}.json"


def current_versions() -> dict[str, str]:
    """Return the versions on which kernels and their speed depend."""
    return {name: importlib.metadata.version(name) for name in ("jaxlib", "jaxserve")}


def write_results(results: DeviceResults) -> Path:
    """Write the file for a kind of device, and return its path."""
    path = results_path(results.device_kind)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    return path


def read_results(device_kind: str) -> DeviceResults:
    """Return what was found on such devices; nothing where there is no file, or where it does not apply."""
    nothing = DeviceResults(device_kind=device_kind, versions={})
    path = results_path(device_kind)
    if not path.exists():
        return nothing
    reason = ""
    try:
        results = msgspec.json.decode(path.read_bytes(), type=DeviceResults)
    except (OSError, msgspec.DecodeError) as error:
        reason, results = str(error), nothing
    if not reason and results.device_kind != device_kind:
        reason = f"it is for {results.device_kind}, not for {device_kind}"
    elif not reason and (versions := current_versions()) != results.versions:
        reason = f"it is for {results.versions}, not for {versions}"
    if not reason:
        return results
    _warn_once(str(path), reason)
    return nothing


@functools.cache
def _warn_once(path: str, reason: str) -> None:
    """Log once: a model is laid out several times while its sizes are chosen."""
    logger.warning(
        "%s is not used: %s; tiles are chosen by formulas. `python -m jaxserve.device_check --tune` writes a new one",
        path,
        reason,
    )
