"""Devices to plan for, with the vendors' figures for memory and speed, and topologies of such devices.

The devices of a topology can only compile. A topology needs the extra `plan` (libtpu, the CUDA plugin), but no device.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxserve.errors import LaunchError
from jaxserve.layout.memory import GPU_MEM_FRACTION

GIB = 1 << 30


class DeviceSpec(NamedTuple):
    """One device as JAX counts them.

    Attributes:
        platform: `tpu`, `gpu` or `cpu`.
        name: name of the topology.
        memory_bytes: device memory that the runtime makes available to programs; 0 if it is not known.
        bytes_per_s: memory bandwidth.
        flops: bfloat16 operations per second, dense.
        per_chip: number of devices per chip.
    """

    platform: str
    name: str
    memory_bytes: int
    bytes_per_s: float
    flops: float
    per_chip: int = 1


class _GpuFacts(NamedTuple):
    """The properties of a GPU that XLA's code generator needs; see `GpuTargetConfigProto`."""

    name: str
    capability: int
    cores: int
    clock_ghz: float
    l2_bytes: int
    memory_bytes: int
    bytes_per_s: int


_GPU_FACTS: Mapping[str, _GpuFacts] = {
    "h100": _GpuFacts("NVIDIA H100 80GB HBM3", 9, 132, 1.98, 50 << 20, 84_942_979_072, 3_352_320_000_000),
    "h200": _GpuFacts("NVIDIA H200 141GB HBM3e", 9, 132, 1.98, 50 << 20, 151_397_597_184, 4_800_000_000_000),
    "b200": _GpuFacts("NVIDIA B200", 10, 148, 1.965, 132_644_864, 191_514_411_008, 7_672_320_000_000),
}


def _gpu(name: str, flops: float) -> DeviceSpec:
    facts = _GPU_FACTS[name]
    return DeviceSpec("gpu", name, int(facts.memory_bytes * GPU_MEM_FRACTION), float(facts.bytes_per_s), flops)


# TPU: docs.cloud.google.com/tpu, system architecture pages; memory is what libtpu's compiler reports as available. GPU:
# NVIDIA's data sheets, SXM, without sparsity.
DEVICES: Mapping[str, DeviceSpec] = {
    "v5e": DeviceSpec("tpu", "v5e", int(15.75 * GIB), 819e9, 197e12),
    "v5p": DeviceSpec("tpu", "v5p", int(95.73 * GIB), 2765e9, 459e12),
    "v6e": DeviceSpec("tpu", "v6e", int(31.24 * GIB), 1640e9, 918e12),
    "tpu7x": DeviceSpec("tpu", "tpu7x", int(94.74 * GIB), 3690e9, 1153e12, per_chip=2),
    "h100": _gpu("h100", 989e12),
    "h200": _gpu("h200", 989e12),
    "b200": _gpu("b200", 2250e12),
    "cpu": DeviceSpec("cpu", "cpu", 0, 0.0, 0.0),
}


class Target(NamedTuple):
    """A topology of devices of one kind.

    Attributes:
        text: the target as the user wrote it.
        device: kind of the devices.
        shape: shape of the topology, in chips.
    """

    text: str
    device: DeviceSpec
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """Number of devices as JAX counts them."""
        return math.prod(self.shape) * self.device.per_chip


def parse_target(text: str) -> Target:
    """Parse a target such as `v6e:2x4`, `h100:8` or `cpu:8`.

    Raises:
        LaunchError: the device is unknown, or the number of devices is missing or malformed.
    """
    name, _, shape = text.partition(":")
    device = DEVICES.get(name.lower())
    if device is None:
        raise LaunchError(f"--target {text}: unknown device {name!r}; known: {', '.join(DEVICES)}")
    pattern = r"\d+(x\d+){1,2}" if device.platform == "tpu" else r"\d+"
    if not re.fullmatch(pattern, shape) or 0 in (sizes := tuple(int(size) for size in shape.split("x"))):
        example = {"tpu": f"{name}:2x2 or {name}:2x2x1", "gpu": f"{name}:8", "cpu": "cpu:8"}[device.platform]
        raise LaunchError(f"--target {text}: expected a number of devices such as {example}")
    return Target(text, device, sizes)


def prepare_environment(target: Target) -> None:
    """Set the environment variables that compilers read when they are loaded; call before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target.device.platform == "tpu":
        # There is no TPU VM to query for metadata, and other processes may compile for TPUs, too.
        os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{target.device.name}-{target.num_devices}")
    elif target.device.platform == "gpu":
        # Autotuning runs candidates on the device.
        set_xla_flag("--xla_gpu_autotune_level", 0)
    else:
        set_xla_flag("--xla_force_host_platform_device_count", target.num_devices)


def set_xla_flag(name: str, value: int) -> None:
    """Set a flag in XLA_FLAGS once: JAX's keys of compiled programs count every repetition."""
    others = (flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag.partition("=")[0] != name)
    os.environ["XLA_FLAGS"] = " ".join([*others, f"{name}={value}"])


def target_devices(target: Target) -> list[Any]:
    """Return devices that compile for the target; for `cpu`, those of this machine.

    Raises:
        LaunchError: the compiler is not installed, or does not support the topology.
    """
    import jax  # noqa: PLC0415
    from jax.experimental import topologies  # noqa: PLC0415

    if target.device.platform == "cpu":
        return jax.devices("cpu")[: target.num_devices]
    shape = "x".join(map(str, target.shape))
    try:
        if target.device.platform == "tpu":
            topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{target.device.name}:{shape}")
        else:
            topology = topologies.get_topology_desc(
                platform="cuda",
                topology_name=target.device.name,
                target_config=_gpu_config(target.device),
                topology=f"1x1x{shape}",
            )
    except Exception as error:
        # JAX has no specific exception for a missing plugin, nor for a topology that a plugin refuses.
        hint = 'is the extra installed? pip install "jaxserve[plan]"'
        raise LaunchError(f"--target {target.text}: no compiler for it ({hint}): {error}") from None
    return list(topology.devices)


def _gpu_config(device: DeviceSpec) -> str:
    """Return XLA's description of a GPU as text; the constants are common to Hopper and Blackwell."""
    facts = _GPU_FACTS[device.name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {facts.cores} clock_rate_ghz: {facts.clock_ghz} l2_cache_size: {facts.l2_bytes}
  memory_bandwidth: {facts.bytes_per_s} device_memory_size: {facts.memory_bytes}
  cuda_compute_capability {{ major: {facts.capability} feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{facts.name}"
"""
