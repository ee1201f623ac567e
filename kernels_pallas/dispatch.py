"""Choice of the implementation of each op, made once when the engine is laid out, with the reason.

`auto` takes the platform's native kernel and falls back to portable XLA where that kernel does not support the config.
A backend that the user named is never replaced: an unsupported config is an error.
"""

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import jax
from jax.sharding import Mesh

from kernels_pallas.grouped_matmul.api import ExpertShape, GroupedMatmul, HeadMatmul
from kernels_pallas.grouped_matmul.xla.backend import XlaGroupedMatmul
from kernels_pallas.grouped_matmul.xla.heads import multiply_heads
from kernels_pallas.lora_matmul.api import LoraMatmul, LoraModule
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionConfig
from kernels_pallas.paged_attention.xla.backend import XlaAttention
from kernels_pallas.quantized import EIGHT_BIT, ElementType
from kernels_pallas.rms_norm.api import RmsNorm
from kernels_pallas.rms_norm.xla.backend import rms_norm
from kernels_pallas.rope.api import Rope
from kernels_pallas.rope.xla.backend import rope
from kernels_pallas.routing.api import Router, RouterConfig
from kernels_pallas.routing.xla.backend import XlaRouter
from kernels_pallas.sampling.api import SampleOutput, SamplingInputs, SamplingMode, SamplingState
from kernels_pallas.sampling.common.summary import Shard
from kernels_pallas.shards import model_size
from kernels_pallas.tuning import NO_TUNING, TuningTable, attention_key, fields_of, pick

S = TypeVar("S")
T = TypeVar("T")

BackendName: TypeAlias = Literal["auto", "tpu", "gpu", "xla"]

# By JAX's platform names, those of compile-only topologies included.
PLATFORM_BACKENDS: Mapping[str, BackendName] = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu", "cpu": "xla"}


# Streaming multiprocessors (SMs) of an H100 or H200.
HOPPER_CORES = 132


class Sampler(Protocol):
    """Samples one token per row of logits."""

    def __call__(
        self, logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState, shard: Shard, mode: SamplingMode
    ) -> SampleOutput:
        """See `kernels_pallas.sampling.api`; `shard` is the part of the vocabulary that the logits cover."""
        ...


class Choice(NamedTuple, Generic[T]):
    """An implementation of an op, and why it was chosen.

    Attributes:
        impl: the implementation.
        name: the name of its backend.
        reason: why it was chosen, for the log.
        is_fallback: whether it replaces the platform's native backend.
    """

    impl: T
    name: BackendName
    reason: str
    is_fallback: bool = False


def choose_attention(
    name: BackendName, config: AttentionConfig, mesh: Mesh, tuning: TuningTable = NO_TUNING
) -> Choice[AttentionBackend]:
    """Choose the attention backend for a mesh.

    Args:
        name: the backend, or `auto`.
        config: config of the whole model.
        mesh: the devices.
        tuning: tiles that were measured on such devices.

    Raises:
        NotImplementedError: the named backend does not support this config, or does not run on these devices.
    """
    return _choose(_ATTENTION, (config, tuning), mesh, name)


def attention_tiles(config: AttentionConfig, mesh: Mesh) -> dict[str, list[dict[str, int | bool]]]:
    """Return the legal tiles of the platform's attention kernels, by the keys of a tuning table.

    The first tile of each key is the one that is used without a table.

    Raises:
        NotImplementedError: the kernels do not support the config, or the platform has none.
    """
    platform = mesh.devices.flat[0].platform
    backend = PLATFORM_BACKENDS.get(platform)
    legal = {"tpu": _tpu_tiles, "gpu": gpu_attention_tiles}.get(backend or "xla")
    if legal is None:
        raise NotImplementedError(f"portable XLA has no tiles, which is what {platform} uses")
    return {key: [fields_of(tile) for tile in tiles] for key, tiles in legal(config, mesh).items()}


def tpu_attention_tiles(config: AttentionConfig, mesh: Mesh, vmem_bytes: int) -> dict[str, list[Any]]:
    """Return the legal `TpuTiles`, by the keys of a tuning table."""
    from kernels_pallas.paged_attention.tpu.layout import TpuLayout  # noqa: PLC0415
    from kernels_pallas.paged_attention.tpu.tuning import legal_tpu_tiles  # noqa: PLC0415

    shard = config.split(model_size(mesh))
    return {attention_key(shard, "both"): list(legal_tpu_tiles(shard, TpuLayout.of(config), vmem_bytes))}


def gpu_attention_tiles(config: AttentionConfig, mesh: Mesh) -> dict[str, list[Any]]:
    """Return the legal tiles of decode and of prefill, by the keys of a tuning table."""
    from kernels_pallas.paged_attention.gpu.tile import legal_tiles  # noqa: PLC0415

    shard = config.split(model_size(mesh))
    return {
        attention_key(shard, part): list(legal_tiles(config, decode=part == "decode")) for part in ("decode", "prefill")
    }


def choose_sampler(mesh: Mesh) -> Choice[Sampler]:
    """Choose the sampler for a mesh; every sampler supports all of `SamplingInputs`."""
    return _choose(_SAMPLERS, None, mesh)


def choose_lora(modules: Collection[LoraModule], mesh: Mesh) -> Choice[LoraMatmul]:
    """Choose the LoRA kernels for these modules on a mesh."""
    return _choose(_LORA, modules, mesh)


def choose_grouped_matmul(shapes: Collection[ExpertShape], mesh: Mesh) -> Choice[GroupedMatmul]:
    """Choose the grouped matmul for matrices of these shapes on a mesh."""
    return _choose(_GROUPED, shapes, mesh)


def choose_router(config: RouterConfig, num_experts: int, mesh: Mesh) -> Choice[Router]:
    """Choose the router for experts on a mesh."""
    return _choose(_ROUTERS, (config, num_experts), mesh)


def choose_norm(mesh: Mesh) -> Choice[RmsNorm]:
    """Choose the RMSNorm for a mesh."""
    return _choose(_NORMS, None, mesh)


def choose_rope(mesh: Mesh) -> Choice[Rope]:
    """Choose the rotary position embedding for a mesh."""
    return _choose(_ROPES, None, mesh)


def choose_head_matmul(mesh: Mesh) -> Choice[HeadMatmul]:
    """Choose the products of heads with their own matrices for a mesh."""
    return _choose(_HEAD_MATMULS, None, mesh)


def _choose(
    makers: Mapping[BackendName, Callable[[S, Mesh], T]], spec: S, mesh: Mesh, name: BackendName = "auto"
) -> Choice[T]:
    """Make the named backend, or with `auto` the platform's native one, falling back to portable XLA.

    Args:
        makers: constructors by backend; a maker raises NotImplementedError for a `spec` that it does not support.
        spec: parameters of the op.
        mesh: the devices.
        name: the backend that the user asked for.

    Raises:
        NotImplementedError: the named backend does not support `spec`, or does not run on these devices.
    """
    platform = mesh.devices.flat[0].platform
    native = PLATFORM_BACKENDS.get(platform, "xla")
    wanted = native if name == "auto" else name
    if wanted not in ("xla", native):
        raise NotImplementedError(f"the {wanted} kernels do not run on {platform} devices")
    try:
        impl = makers[wanted](spec, mesh)
    except NotImplementedError as error:
        if name != "auto":
            raise
        return Choice(
            makers["xla"](spec, mesh), "xla", f"the {native} kernel does not support it: {error}", is_fallback=True
        )
    return Choice(impl, wanted, f"native to {platform}" if name == "auto" else "requested")


def multiplies(mesh: Mesh, element_type: str) -> bool:
    """Return whether XLA's products of 8-bit elements are faster than those of bf16 on these devices."""
    device = mesh.devices.flat[0]
    pattern = _FAST_ELEMENTS.get((PLATFORM_BACKENDS.get(device.platform, "xla"), element_type))
    return pattern is not None and re.search(pattern, device.device_kind) is not None


def lora_rank_multiple(mesh: Mesh) -> int:
    """Return the multiple to which LoRA ranks are padded on these devices."""
    return _LORA_RANK_MULTIPLES.get(PLATFORM_BACKENDS.get(mesh.devices.flat[0].platform, "xla"), 1)


def _tpu_attention(spec: tuple[AttentionConfig, TuningTable], mesh: Mesh) -> AttentionBackend:
    from kernels_pallas.paged_attention.tpu.backend import TpuAttention  # noqa: PLC0415
    from kernels_pallas.pallas import tpu_chip  # noqa: PLC0415

    config, tuning = spec
    tiles = None
    if tuning.tiles:
        (tiles,) = (pick(legal, tuning.tiles.get(key)) for key, legal in _tpu_tiles(config, mesh).items())
    return TpuAttention(config, mesh, tpu_chip(mesh.devices.flat[0]), tiles=tiles)


def _tpu_tiles(config: AttentionConfig, mesh: Mesh) -> dict[str, list[Any]]:
    from kernels_pallas.pallas import tpu_chip  # noqa: PLC0415

    return tpu_attention_tiles(config, mesh, tpu_chip(mesh.devices.flat[0]).vmem_bytes)


def _gpu_attention(spec: tuple[AttentionConfig, TuningTable], mesh: Mesh) -> AttentionBackend:
    _require_hopper(mesh)
    from kernels_pallas.paged_attention.gpu.backend import GpuAttention  # noqa: PLC0415

    config, tuning = spec
    decode, prefill = (pick(legal, tuning.tiles.get(key)) for key, legal in gpu_attention_tiles(config, mesh).items())
    return GpuAttention(config, mesh, num_cores=_num_cores(mesh), tiles=(decode, prefill))


def _xla_attention(spec: tuple[AttentionConfig, TuningTable], mesh: Mesh) -> AttentionBackend:
    return XlaAttention(spec[0], mesh)


def _num_cores(mesh: Mesh) -> int:
    """Return the number of SMs of a GPU; devices of a compile-only topology do not report it."""
    return getattr(mesh.devices.flat[0], "core_count", HOPPER_CORES)


def _require_hopper(mesh: Mesh) -> None:
    """Raise NotImplementedError unless the GPU is Hopper: Ampere has no TMA and no wgmma, Blackwell uses tcgen05."""
    device = mesh.devices.flat[0]
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"the GPU kernels need JAX 0.11, this is {jax.__version__}")
    if not re.search(r"\bG?H(20|100|200|800)\b", device.device_kind):
        raise NotImplementedError(f"the kernels support only Hopper, not {device.device_kind}")


def _tpu_sampler(_: None, mesh: Mesh) -> Sampler:
    from kernels_pallas.pallas import tpu_chip  # noqa: PLC0415
    from kernels_pallas.sampling.tpu.backend import choose_block, sample  # noqa: PLC0415

    return partial(sample, block=choose_block(tpu_chip(mesh.devices.flat[0]).vmem_bytes))


def _gpu_sampler(_: None, mesh: Mesh) -> Sampler:
    _require_hopper(mesh)
    from kernels_pallas.sampling.gpu.backend import sample  # noqa: PLC0415

    return sample


def _xla_sampler(_: None, __: Mesh) -> Sampler:
    from kernels_pallas.sampling.xla.backend import sample  # noqa: PLC0415

    return sample


def _tpu_lora(modules: Collection[LoraModule], mesh: Mesh) -> LoraMatmul:
    from kernels_pallas.lora_matmul.tpu.backend import check_inputs, make_lora_matmul  # noqa: PLC0415

    for module in modules:
        check_inputs(module.num_inputs)
    return make_lora_matmul(mesh)


def _gpu_lora(modules: Collection[LoraModule], mesh: Mesh) -> LoraMatmul:
    _require_hopper(mesh)
    from kernels_pallas.lora_matmul.gpu.backend import check_module, make_lora_matmul  # noqa: PLC0415

    for module in modules:
        check_module(module)
    return make_lora_matmul(mesh, num_cores=_num_cores(mesh))


def _xla_lora(_: Collection[LoraModule], __: Mesh) -> LoraMatmul:
    from kernels_pallas.lora_matmul.xla.backend import XlaLora  # noqa: PLC0415

    return XlaLora()


def _tpu_grouped(shapes: Collection[ExpertShape], mesh: Mesh) -> GroupedMatmul:
    from kernels_pallas.grouped_matmul.tpu.backend import TpuGroupedMatmul, check_shape  # noqa: PLC0415

    for shape in shapes:
        check_shape(shape)
    elements: list[ElementType] = [element for element in EIGHT_BIT if multiplies(mesh, element)]
    return TpuGroupedMatmul(mesh.devices.flat[0].num_cores, elements)


def _gpu_grouped(shapes: Collection[ExpertShape], mesh: Mesh) -> GroupedMatmul:
    _require_hopper(mesh)
    from kernels_pallas.grouped_matmul.gpu import backend, narrow  # noqa: PLC0415

    if any(narrow.is_narrow(shape) for shape in shapes):
        for shape in shapes:
            narrow.check_shape(shape)
        return narrow.GpuNarrowMatmul()
    for shape in shapes:
        backend.check_shape(shape)
    return backend.GpuGroupedMatmul(_num_cores(mesh))


def _xla_grouped(_: Collection[ExpertShape], __: Mesh) -> GroupedMatmul:
    return XlaGroupedMatmul()


def _gpu_router(spec: tuple[RouterConfig, int], mesh: Mesh) -> Router:
    _require_hopper(mesh)
    from kernels_pallas.routing.gpu.backend import GpuRouter, num_parts  # noqa: PLC0415

    num_parts(*spec)
    return GpuRouter(spec[0], mesh)


def _xla_router(spec: tuple[RouterConfig, int], _: Mesh) -> Router:
    return XlaRouter(spec[0])


def _gpu_norm(_: None, mesh: Mesh) -> RmsNorm:
    _require_hopper(mesh)
    from kernels_pallas.rms_norm.gpu.backend import GpuRmsNorm  # noqa: PLC0415

    return GpuRmsNorm(mesh)


def _gpu_rope(_: None, mesh: Mesh) -> Rope:
    _require_hopper(mesh)
    from kernels_pallas.rope.gpu.backend import GpuRope  # noqa: PLC0415

    return GpuRope(mesh)


def _gpu_head_matmul(_: None, mesh: Mesh) -> HeadMatmul:
    _require_hopper(mesh)
    from kernels_pallas.grouped_matmul.gpu.heads import GpuHeadMatmul  # noqa: PLC0415

    return GpuHeadMatmul(mesh, _num_cores(mesh))


def _portable(impl: T) -> Callable[[None, Mesh], T]:
    """Return a constructor of an implementation that has no parameters."""
    return lambda _, __: impl


# Kinds of devices by backend and element type. On GPU, XLA calls cuBLAS for int8; TPUs since v7 multiply fp8.
_FAST_ELEMENTS: Mapping[tuple[BackendName, str], str] = {
    ("gpu", "int8"): r"\b([AH]100|[HB]200|H800|H20|B100|GB200|GH200)\b",
    ("tpu", "int8"): r"v5|v6",
    ("tpu", "fp8"): r"TPU7",
}

# Kernels are imported only when they are chosen: they need a newer JAX than the portable XLA code.
_ATTENTION: Mapping[BackendName, Callable[[tuple[AttentionConfig, TuningTable], Mesh], AttentionBackend]] = {
    "tpu": _tpu_attention,
    "gpu": _gpu_attention,
    "xla": _xla_attention,
}
_LORA: Mapping[BackendName, Callable[[Collection[LoraModule], Mesh], LoraMatmul]] = {
    "tpu": _tpu_lora,
    "gpu": _gpu_lora,
    "xla": _xla_lora,
}
_GROUPED: Mapping[BackendName, Callable[[Collection[ExpertShape], Mesh], GroupedMatmul]] = {
    "tpu": _tpu_grouped,
    "gpu": _gpu_grouped,
    "xla": _xla_grouped,
}
# The K size of a wgmma instruction on 16-bit operands.
_LORA_RANK_MULTIPLES: Mapping[BackendName, int] = {"gpu": 16}
_SAMPLERS: Mapping[BackendName, Callable[[None, Mesh], Sampler]] = {
    "tpu": _tpu_sampler,
    "gpu": _gpu_sampler,
    "xla": _xla_sampler,
}
# TPUs run portable XLA where it fuses what GPUs need kernels for.
_ROUTERS: Mapping[BackendName, Callable[[tuple[RouterConfig, int], Mesh], Router]] = {
    "tpu": _xla_router,
    "gpu": _gpu_router,
    "xla": _xla_router,
}
_NORMS: Mapping[BackendName, Callable[[None, Mesh], RmsNorm]] = {
    "tpu": _portable(rms_norm),
    "gpu": _gpu_norm,
    "xla": _portable(rms_norm),
}
_ROPES: Mapping[BackendName, Callable[[None, Mesh], Rope]] = {
    "tpu": _portable(rope),
    "gpu": _gpu_rope,
    "xla": _portable(rope),
}
_HEAD_MATMULS: Mapping[BackendName, Callable[[None, Mesh], HeadMatmul]] = {
    "tpu": _portable(multiply_heads),
    "gpu": _gpu_head_matmul,
    "xla": _portable(multiply_heads),
}
