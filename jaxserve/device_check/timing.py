"""Times a call in a loop on the device, so that the host's part is left out."""

import statistics
import time
from typing import Any, NamedTuple

import jax
from jax import lax

from jaxserve.device_check.speed_cases import Timed
from jaxserve.plan.targets import DEVICES, DeviceSpec


class Loop(NamedTuple):
    """How often a call is timed: `runs` loops of `calls` calls."""

    calls: int = 32
    runs: int = 20


def seconds_of(timed: Timed, loop: Loop) -> float:
    """Return the median duration of one call."""

    def repeat(varying: Any, *constants: Any) -> Any:
        return lax.fori_loop(0, loop.calls, lambda _, varying: timed.run(varying, *constants), varying)

    run = jax.jit(repeat, donate_argnums=0)
    varying = jax.block_until_ready(run(timed.varying, *timed.constants))
    durations: list[float] = []
    for _ in range(loop.runs):
        started = time.perf_counter()
        varying = jax.block_until_ready(run(varying, *timed.constants))
        durations.append((time.perf_counter() - started) / loop.calls)
    return statistics.median(durations)


def share_of(timed: Timed, seconds: float, device: DeviceSpec | None) -> float | None:
    """Return the least time that the device could take over the time that it took."""
    if device is None:
        return None
    return max(timed.num_bytes / device.bytes_per_s, timed.num_flops / device.flops) / seconds


def device_spec(kind: str) -> DeviceSpec | None:
    """Return the vendor's figures for a device, by JAX's name of its kind."""
    return DEVICES.get(_NAMES.get(kind, ""))


# By JAX's names.
_NAMES = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
