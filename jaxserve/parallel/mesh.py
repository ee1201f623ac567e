"""The device mesh, and the table from logical axes to mesh axes that defines the sharding strategy."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ModelConfig, MoeConfig
from jaxserve.errors import LaunchError
from kernels_pallas.shards import DATA, EXPERT, IN_EXPERT, MODEL, model_size

# Tensor parallelism splits heads, MLP and vocabulary over all devices of a replica; everything else is replicated.
# Experts are distributed over a replica's axis `expert`, and each expert is split over `model`. The only weights split
# over `data` are experts that replicas share; replicas have their own requests and their own copy of all other weights.
SHARDING_RULES: dict[str, str | tuple[str, ...] | None] = {
    "vocab": MODEL,
    "heads": MODEL,
    "kv_heads": MODEL,
    "mlp": MODEL,
    "experts": EXPERT,
    "experts_shared": (DATA, EXPERT),
    "expert_mlp": IN_EXPERT,
    "hidden": None,
    "layers": None,
}


def make_mesh(tp_size: int, dp_size: int = 1, ep_size: int = 1) -> Mesh:
    """Create a mesh over the first `dp_size * tp_size` devices; see `mesh_of`.

    Raises:
        LaunchError: there are too few devices, or devices of several hosts are left unused.
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
    return mesh_of(devices, tp_size, dp_size, ep_size)


def mesh_of(devices: Sequence[Any], tp_size: int, dp_size: int = 1, ep_size: int = 1) -> Mesh:
    """Create a (data, expert, model) mesh over the first `dp_size * tp_size` devices, which need not be attached.

    Args:
        devices: devices to choose from.
        tp_size: devices per replica.
        dp_size: number of replicas.
        ep_size: number of groups of a replica's devices, each with its own experts; divides `tp_size`.
    """
    grid = np.array(devices[: dp_size * tp_size]).reshape(dp_size, ep_size, tp_size // ep_size)
    return Mesh(grid, (DATA, *MODEL), axis_types=(AxisType.Auto,) * grid.ndim)


def mesh_shape(tp_size: int, ep_size: int = 1, dp_size: int = 1) -> AbstractMesh:
    """Create a mesh of which only the shape is known; see `mesh_of`."""
    return AbstractMesh((dp_size, ep_size, tp_size // ep_size), (DATA, *MODEL))


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Map an array's logical axes to mesh axes; a vocabulary that does not divide evenly is replicated."""
    spec: list[str | tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axis = SHARDING_RULES[axis] if axis is not None else None
        if axis == "vocab" and size % model_size(mesh):
            mesh_axis = None
        spec.append(mesh_axis)
    return PartitionSpec(*spec)


def named_sharding(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return `partition_spec` as a sharding on a mesh."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def weight_format(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> Format:
    """Return the layout and sharding of a weight: sharded as in `named_sharding`, with its last axis contiguous.

    By default, TPUs store arrays transposed if their last axis is no multiple of 128. Every step that passes one to a
    kernel, or reads rows of it, would first copy all of it. A last axis that is split to one entry on a device, such as
    the scales of 128 inputs, would be padded to 128; there, the axis before it is contiguous instead.
    """
    sharding = named_sharding(axes, shape, mesh)
    order = list(range(len(shape)))
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    if is_tpu and shape and shape[-1] > 1 and sharding.shard_shape(shape)[-1] == 1:
        order[-2:] = reversed(order[-2:])
    return Format(Layout(tuple(order)), sharding)


def over_replicas(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Return the partition spec of an array over the `data` axis alone."""
    rules = (SHARDING_RULES[axis] if axis is not None else None for axis in axes)
    return PartitionSpec(*(DATA if rule is not None and DATA in rule else None for rule in rules))


def kv_head_replication(config: ModelConfig, mesh: Mesh | AbstractMesh, *, shared_experts: bool = False) -> int:
    """Return how often each KV head is repeated to give every device one; check that other sizes divide.

    Args:
        config: config of the model.
        mesh: the device mesh, or only its shape.
        shared_experts: see `Parallelism`.

    Raises:
        LaunchError: heads, MLP columns or experts do not divide evenly.
    """
    tp_size, ep_size = model_size(mesh), mesh.shape[EXPERT]
    if config.num_q_heads % tp_size:
        raise LaunchError(f"--tp-size {tp_size} does not divide the model's {config.num_q_heads} attention heads")
    if any(layer.mlp == "dense" for layer in config.layers) and config.intermediate_size % tp_size:
        raise LaunchError(f"--tp-size {tp_size} does not divide the model's MLP size {config.intermediate_size}")
    if config.moe is not None:
        _check_experts(config.moe, tp_size, ep_size, mesh.shape[DATA] if shared_experts else 1)
    elif ep_size > 1:
        raise LaunchError(f"--ep-size {ep_size}: the model has no experts")
    if config.num_kv_heads % tp_size == 0:
        return 1
    if tp_size % config.num_kv_heads:
        raise LaunchError(
            f"--tp-size {tp_size} is neither a divisor nor a multiple of the model's {config.num_kv_heads} KV heads"
        )
    return tp_size // config.num_kv_heads


def _check_experts(experts: MoeConfig, tp_size: int, ep_size: int, num_replicas: int) -> None:
    if experts.num_experts % (ep_size * num_replicas):
        raise LaunchError(
            f"--ep-size {ep_size * num_replicas} does not divide the model's {experts.num_experts} experts"
        )
    if experts.intermediate_size % (expert_shards := tp_size // ep_size):
        raise LaunchError(
            f"--tp-size {tp_size} with --ep-size {ep_size} splits each expert into {expert_shards} shards, which "
            f"does not divide its size {experts.intermediate_size}"
        )
    if (shared := experts.shared_intermediate_size) is not None and shared % tp_size:
        raise LaunchError(f"--tp-size {tp_size} does not divide the size {shared} of the model's shared expert")
