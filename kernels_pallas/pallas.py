"""Pallas names that this project uses: the one module to change when a JAX release moves a name.

Needs JAX 0.11 or newer, so only the kernels import it, and kernels are imported only once a backend has been chosen.
"""

from typing import Any, NamedTuple

import jax
from jax._src.mesh import AbstractDevice
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh

__all__ = ["TpuChip", "pl", "plgpu", "pltpu", "tpu_chip"]


class TpuChip(NamedTuple):
    """A TPU device.

    Attributes:
        vmem_bytes, smem_bytes: vector memory (VMEM) and scalar memory (SMEM) of a core.
        num_cores: TensorCores that run a kernel together, each a part of its parallel grid.
    """

    vmem_bytes: int
    smem_bytes: int
    num_cores: int = 1


def tpu_chip(device: Any) -> TpuChip:
    """Return the memory sizes and cores of a TPU, which may be compile-only."""
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=abstract)):
        info = pltpu.get_tpu_info()
    return TpuChip(info.vmem_capacity_bytes, info.smem_capacity_bytes, device.num_cores)
