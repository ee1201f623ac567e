"""Which implementation of an op runs: chosen once, when the engine is laid out, with the reason.

`auto` is the platform's own kernel; where that cannot do what is asked for it is the portable one. A backend that was
named is an error instead.
"""

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import jax
from jax.sharding import Mesh

from kernels_pallas.grouped_matmul.api import ExpertShape, GroupedMatmul
from kernels_pallas.grouped_matmul.xla.backend import XlaGroupedMatmul
from kernels_pallas.lora_matmul.api import LoraMatmul, LoraModule
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionConfig
from kernels_pallas.paged_attention.xla.backend import XlaAttention
from kernels_pallas.sampling.api import SampleOutput, SamplingInputs, SamplingState
from kernels_pallas.sampling.common.summary import Shard

BackendName: TypeAlias = Literal["auto", "tpu", "gpu", "xla"]

# Names that JAX gives the platforms, on devices and on topologies of devices that are not there.
PLATFORM_BACKENDS: Mapping[str, BackendName] = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu", "cpu": "xla"}


class Sampler(Protocol):
    """Draws one token per row of logits."""

    def __call__(
        self, logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState, shard: Shard
    ) -> SampleOutput:
        """See `kernels_pallas.sampling.api`; `shard` tells which part of the vocabulary the logits are of."""
        ...


class ChosenAttention(NamedTuple):
    """An attention backend, its name, and why it was chosen; `is_fallback` tells that it is not the platform's own."""

    backend: AttentionBackend
    name: BackendName
    reason: str
    is_fallback: bool = False


class ChosenSampler(NamedTuple):
    """A sampler, its name, and why it was chosen; `is_fallback` tells that it is not the platform's own."""

    sample: Sampler
    name: str
    reason: str
    is_fallback: bool = False


class ChosenLora(NamedTuple):
    """Low-rank updates, their name, and why they were chosen; `is_fallback` tells that they are not the platform's own."""

    matmul: LoraMatmul
    name: str
    reason: str
    is_fallback: bool = False


class ChosenGroupedMatmul(NamedTuple):
    """Products with experts, their name, and why they were chosen; `is_fallback` tells that they are not the platform's."""

    matmul: GroupedMatmul
    name: str
    reason: str
    is_fallback: bool = False


def choose_attention(name: BackendName, config: AttentionConfig, mesh: Mesh) -> ChosenAttention:
    """The attention backend for a mesh.

    Raises:
        NotImplementedError: the backend that was named cannot do this, or not on these devices.
    """
    platform = mesh.devices.flat[0].platform
    own = PLATFORM_BACKENDS.get(platform, "xla")
    wanted = own if name == "auto" else name
    if wanted not in ("xla", own):
        raise NotImplementedError(f"the {wanted} kernels do not run on {platform} devices")
    try:
        backend = _ATTENTION[wanted](config, mesh)
    except NotImplementedError as error:
        if name != "auto":
            raise
        return ChosenAttention(XlaAttention(config, mesh), "xla", f"the {own} kernel cannot: {error}", is_fallback=True)
    reason = f"made for {platform}" if name == "auto" else "asked for"
    return ChosenAttention(backend, wanted, reason)


def choose_sampler(mesh: Mesh) -> ChosenSampler:
    """The sampler for a mesh; each of them does all that `SamplingInputs` can ask."""
    device = mesh.devices.flat[0]
    own = PLATFORM_BACKENDS.get(device.platform, "xla")
    try:
        return ChosenSampler(_SAMPLERS[own](device), own, f"made for {device.platform}")
    except NotImplementedError as error:
        return ChosenSampler(_xla_sampler(device), "xla", f"the {own} kernel cannot: {error}", is_fallback=True)


def choose_lora(modules: Collection[LoraModule], mesh: Mesh) -> ChosenLora:
    """Low-rank updates of these modules on a mesh."""
    platform = mesh.devices.flat[0].platform
    own = PLATFORM_BACKENDS.get(platform, "xla")
    try:
        return ChosenLora(_LORA[own](modules, mesh), own, f"made for {platform}")
    except NotImplementedError as error:
        return ChosenLora(_xla_lora(modules, mesh), "xla", f"the {own} kernel cannot: {error}", is_fallback=True)


def choose_grouped_matmul(shapes: Collection[ExpertShape], mesh: Mesh) -> ChosenGroupedMatmul:
    """Products with experts of these shapes on a mesh."""
    device = mesh.devices.flat[0]
    own = PLATFORM_BACKENDS.get(device.platform, "xla")
    try:
        return ChosenGroupedMatmul(_GROUPED[own](shapes, device), own, f"made for {device.platform}")
    except NotImplementedError as error:
        return ChosenGroupedMatmul(XlaGroupedMatmul(), "xla", f"the {own} kernel cannot: {error}", is_fallback=True)


def lora_rank_multiple(mesh: Mesh) -> int:
    """What the rank of factors on these devices is filled up to a multiple of."""
    return _LORA_RANK_MULTIPLES.get(PLATFORM_BACKENDS.get(mesh.devices.flat[0].platform, "xla"), 1)


def _tpu_attention(config: AttentionConfig, mesh: Mesh) -> AttentionBackend:
    from kernels_pallas.paged_attention.tpu.backend import TpuAttention  # noqa: PLC0415
    from kernels_pallas.pallas import tpu_memory  # noqa: PLC0415

    return TpuAttention(config, mesh, tpu_memory(mesh.devices.flat[0]))


def _gpu_attention(config: AttentionConfig, mesh: Mesh) -> AttentionBackend:
    device = mesh.devices.flat[0]
    _require_hopper(device)
    from kernels_pallas.paged_attention.gpu.backend import GpuAttention  # noqa: PLC0415

    return GpuAttention(config, mesh, num_cores=getattr(device, "core_count", HOPPER_CORES))


def _require_hopper(device: Any) -> None:
    """The GPU kernels use TMA and wgmma: Ampere has neither, Blackwell multiplies with tcgen05 instead."""
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"the GPU kernels need JAX 0.11, this is {jax.__version__}")
    if not re.search(r"\bG?H(20|100|200|800)\b", device.device_kind):
        raise NotImplementedError(f"the kernels are made for Hopper, not for {device.device_kind}")


def _tpu_sampler(device: Any) -> Sampler:
    from kernels_pallas.pallas import tpu_memory  # noqa: PLC0415
    from kernels_pallas.sampling.tpu.backend import choose_block, sample  # noqa: PLC0415

    return partial(sample, block=choose_block(tpu_memory(device).vmem_bytes))


def _gpu_sampler(device: Any) -> Sampler:
    _require_hopper(device)
    from kernels_pallas.sampling.gpu.backend import sample  # noqa: PLC0415

    return sample


def _xla_sampler(_: Any) -> Sampler:
    from kernels_pallas.sampling.xla.backend import sample  # noqa: PLC0415

    return sample


def _tpu_lora(modules: Collection[LoraModule], mesh: Mesh) -> LoraMatmul:
    from kernels_pallas.lora_matmul.tpu.backend import check_inputs, make_lora_matmul  # noqa: PLC0415

    for module in modules:
        check_inputs(module.num_inputs)
    return make_lora_matmul(mesh)


def _gpu_lora(modules: Collection[LoraModule], mesh: Mesh) -> LoraMatmul:
    device = mesh.devices.flat[0]
    _require_hopper(device)
    from kernels_pallas.lora_matmul.gpu.backend import check_module, make_lora_matmul  # noqa: PLC0415

    for module in modules:
        check_module(module)
    return make_lora_matmul(mesh, num_cores=getattr(device, "core_count", HOPPER_CORES))


def _xla_lora(_: Collection[LoraModule], __: Mesh) -> LoraMatmul:
    from kernels_pallas.lora_matmul.xla.backend import XlaLora  # noqa: PLC0415

    return XlaLora()


def _tpu_grouped(shapes: Collection[ExpertShape], _: Any) -> GroupedMatmul:
    from kernels_pallas.grouped_matmul.tpu.backend import TpuGroupedMatmul, check_shape  # noqa: PLC0415

    for shape in shapes:
        check_shape(shape)
    return TpuGroupedMatmul()


def _gpu_grouped(shapes: Collection[ExpertShape], device: Any) -> GroupedMatmul:
    _require_hopper(device)
    from kernels_pallas.grouped_matmul.gpu.backend import GpuGroupedMatmul, check_shape  # noqa: PLC0415

    for shape in shapes:
        check_shape(shape)
    return GpuGroupedMatmul()


def _xla_grouped(_: Collection[ExpertShape], __: Any) -> GroupedMatmul:
    return XlaGroupedMatmul()


# Multiprocessors of an H100 or H200; devices of a topology do not tell.
HOPPER_CORES = 132

# Kernels are imported when they are chosen: they need a newer JAX than the portable ones.
_ATTENTION: Mapping[BackendName, Callable[[AttentionConfig, Mesh], AttentionBackend]] = {
    "tpu": _tpu_attention,
    "gpu": _gpu_attention,
    "xla": XlaAttention,
}
_LORA: Mapping[BackendName, Callable[[Collection[LoraModule], Mesh], LoraMatmul]] = {
    "tpu": _tpu_lora,
    "gpu": _gpu_lora,
    "xla": _xla_lora,
}
_GROUPED: Mapping[BackendName, Callable[[Collection[ExpertShape], Any], GroupedMatmul]] = {
    "tpu": _tpu_grouped,
    "gpu": _gpu_grouped,
    "xla": _xla_grouped,
}
# What Hopper's tensor cores take at a time.
_LORA_RANK_MULTIPLES: Mapping[BackendName, int] = {"gpu": 16}
_SAMPLERS: Mapping[BackendName, Callable[[Any], Sampler]] = {
    "tpu": _tpu_sampler,
    "gpu": _gpu_sampler,
    "xla": _xla_sampler,
}
