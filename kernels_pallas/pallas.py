"""Pallas as this project uses it: the one module to look at when a JAX release moves a name.

Needs JAX 0.11 or newer, so only the kernels import it, and they are imported once a backend has been chosen.
"""

from typing import Any, NamedTuple

import jax
from jax._src.mesh import AbstractDevice
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh

__all__ = ["TpuMemory", "pl", "plgpu", "pltpu", "tpu_memory"]


class TpuMemory(NamedTuple):
    """Memory on a TPU's chip, in bytes: for vectors, and for numbers read one at a time."""

    vmem_bytes: int
    smem_bytes: int


def tpu_memory(device: Any) -> TpuMemory:
    """Memory sizes of a TPU, also of a compile-only one."""
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=abstract)):
        info = pltpu.get_tpu_info()
    return TpuMemory(info.vmem_capacity_bytes, info.smem_capacity_bytes)
