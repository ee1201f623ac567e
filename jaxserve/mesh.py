"""The device mesh and the table from logical axes to mesh axes. Changing the strategy is changing the table."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ModelConfig
from jaxserve.errors import LaunchError

logger = logging.getLogger(__name__)

# Tensor parallelism splits heads, MLP and vocabulary over `model`; everything else is replicated. Weights are
# never split over `data`: each copy of the model there has its own requests.
SHARDING_RULES: dict[str, str | None] = {
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "hidden": None,
    "layers": None,
}


def make_mesh(tp_size: int, dp_size: int = 1) -> Mesh:
    """A (data, model) mesh over the first `dp_size * tp_size` devices.

    Raises:
        LaunchError: there are not that many devices.
    """
    devices = jax.devices()
    count = dp_size * tp_size
    if count > len(devices):
        raise LaunchError(
            f"--tp-size {tp_size} and --dp-size {dp_size} need {count} devices, "
            f"{len(devices)} {devices[0].platform} found"
        )
    if jax.process_count() > 1 and count < len(devices):
        raise LaunchError(
            f"--tp-size {tp_size} and --dp-size {dp_size} use {count} of the {len(devices)} devices of all hosts; "
            "with --nnodes they must use all"
        )
    return mesh_of(devices, tp_size, dp_size)


def mesh_of(devices: Sequence[Any], tp_size: int, dp_size: int = 1) -> Mesh:
    """A (data, model) mesh over the first `dp_size * tp_size` of the devices, which need not be there."""
    grid = np.array(devices[: dp_size * tp_size]).reshape(dp_size, tp_size)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Mesh axes of an array's logical axes; a vocabulary that does not divide stays whole."""
    spec: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axis = SHARDING_RULES[axis] if axis is not None else None
        if mesh_axis is not None and axis == "vocab" and size % mesh.shape[mesh_axis]:
            logger.warning("vocabulary of %d does not divide by %d: it is replicated", size, mesh.shape[mesh_axis])
            mesh_axis = None
        spec.append(mesh_axis)
    return PartitionSpec(*spec)


def named_sharding(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """`partition_spec` on a mesh."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def kv_head_copies(config: ModelConfig, tp_size: int) -> int:
    """How often each key/value head is repeated so that every device has one; checks that all heads divide.

    Raises:
        LaunchError: heads or MLP columns do not divide by `tp_size`.
    """
    if config.num_q_heads % tp_size:
        raise LaunchError(f"--tp-size {tp_size} does not divide the model's {config.num_q_heads} attention heads")
    if config.intermediate_size % tp_size:
        raise LaunchError(f"--tp-size {tp_size} does not divide the model's MLP size {config.intermediate_size}")
    if config.num_kv_heads % tp_size == 0:
        return 1
    if tp_size % config.num_kv_heads:
        raise LaunchError(f"--tp-size {tp_size} and the model's {config.num_kv_heads} key heads do not divide")
    return tp_size // config.num_kv_heads
