"""What an engine will be, from its settings and the model's config alone: no weight is read, no memory taken.

The engine is built from this, and `jaxserve.plan` compiles it for devices that are not there.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import msgspec
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxserve.config import CacheConfig, EngineConfig, ModelConfig, QuantizationConfig, SchedulerConfig
from jaxserve.errors import LaunchError
from jaxserve.layers.linear import format_of
from jaxserve.layout.mla_prefill import layout_workspace
from jaxserve.lora.pool import LoraPoolLayout, lora_expert_shapes, lora_modules
from jaxserve.models.architecture import Architecture, DecoderArgs
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf.quantization import with_requested
from jaxserve.models.param_spec import ParamSpec, Path
from jaxserve.models.registry import find_architecture
from jaxserve.parallel.mesh import kv_head_replication, mesh_shape, partition_spec
from jaxserve.runner.batch import BatchLayout
from jaxserve.runner.buckets import ACCELERATOR_STEPS, CPU_STEPS, make_buckets
from jaxserve.runner.programs import StepModel
from kernels_pallas.dispatch import (
    ChosenAttention,
    choose_attention,
    choose_grouped_matmul,
    choose_lora,
    choose_sampler,
)
from kernels_pallas.grouped_matmul.api import ExpertShape, GroupedMatmul
from kernels_pallas.grouped_matmul.xla.backend import XlaGroupedMatmul
from kernels_pallas.lora_matmul.api import LoraMatmul
from kernels_pallas.lora_matmul.xla.backend import XlaLora
from kernels_pallas.paged_attention.api import AttentionConfig
from kernels_pallas.paged_attention.common.head_shards import cache_bytes
from kernels_pallas.shards import DATA, model_size

logger = logging.getLogger(__name__)

# Of the pool, what prompts that are expanded may take at most.
_WORKSPACE_DIVISOR = 32

# By platform. Larger pages waste more at the end of a row, smaller ones cost a copy each.
_PAGE_SIZES = {"cpu": (64,), "tpu": (128, 256)}
_KV_DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp8_e4m3": "float8_e4m3fn", "int8": "int8"}


class ModelLayout(NamedTuple):
    """A model on a mesh.

    Attributes:
        architecture: of the checkpoint.
        checkpoint: the model as its maker describes it.
        model: as it is computed here: key heads are repeated where there are fewer than devices.
        dtype: of weights and activations.
        kv_dtype: of cached keys and values.
        decoder: the model, as its weights are loaded.
        scheduler: limits of a step.
        page_sizes: tokens per page, to choose from: the smallest whose page table the device can hold.
        mesh: of the devices, see `jaxserve.parallel.mesh`.
    """

    architecture: Architecture
    checkpoint: ModelConfig
    model: ModelConfig
    dtype: jnp.dtype
    kv_dtype: jnp.dtype
    decoder: Decoder
    scheduler: SchedulerConfig
    page_sizes: tuple[int, ...]
    mesh: Mesh

    @property
    def device_weight_bytes(self) -> int:
        """Of the weights, on each device."""
        return sum(spec.shard_bytes(self.mesh) for spec in self.decoder.param_specs.values())

    @property
    def device_read_bytes(self) -> int:
        """Of the weights that a step reads whole, on each device.

        Those of experts are read where they have tokens, an embedding that is not the head by rows.
        """
        embed = (
            0 if self.model.tie_word_embeddings else self.decoder.param_specs["embed", "weight"].shard_bytes(self.mesh)
        )
        return self.device_weight_bytes - embed - self.device_expert_bytes

    @property
    def device_expert_bytes(self) -> int:
        """Of the experts' weights, on each device."""
        return sum(spec.shard_bytes(self.mesh) for spec in self.decoder.param_specs.values() if spec.of_experts)


class EngineLayout(NamedTuple):
    """A model with its memory laid out.

    Attributes:
        cache: the pool of one copy.
        pool_bytes: what it takes of each device.
        scheduler: limits of a step, with the context cut to what the pool holds.
        attention_name: of the attention backend.
        step: what the step's programs are made of.
    """

    cache: CacheConfig
    pool_bytes: int
    scheduler: SchedulerConfig
    attention_name: str
    step: StepModel


def layout_model(config: EngineConfig, hf_config: Mapping[str, Any], mesh: Mesh) -> ModelLayout:
    """Fit a model onto a mesh.

    Args:
        config: the settings.
        hf_config: parsed `config.json`.
        mesh: of the devices, there or not.

    Raises:
        LaunchError: settings, model and devices do not fit together.
    """
    architecture = find_architecture(hf_config)
    checkpoint = with_requested(architecture.model_config(hf_config), hf_config, config.quantization)
    platform = mesh.devices.flat[0].platform
    if config.dp_attention:
        if checkpoint.experts is None:
            raise LaunchError("--enable-dp-attention: the model has no experts for its copies to share")
        shared = msgspec.structs.replace(checkpoint.experts, shared_by_replicas=True)
        checkpoint = msgspec.structs.replace(checkpoint, experts=shared)
    copies = kv_head_replication(checkpoint, mesh)
    model = msgspec.structs.replace(checkpoint, num_kv_heads=checkpoint.num_kv_heads * copies)
    dtype = pick_dtype(config, checkpoint)
    if config.merge_lora is not None and checkpoint.quantization is not None:
        raise LaunchError("--merge-lora: the model's weights are quantised: serve the adapter with --lora-paths")
    decoder = architecture.build(DecoderArgs(model, dtype, batch_invariant=config.deterministic))
    _check_blocks(decoder, mesh, copies)
    if model.vocab_size % model_size(mesh):
        logger.warning("vocabulary of %d does not divide by %d: it is replicated", model.vocab_size, model_size(mesh))
    return ModelLayout(
        architecture=architecture,
        checkpoint=checkpoint,
        model=model,
        dtype=dtype,
        kv_dtype=dtype if config.kv_cache_dtype == "auto" else jnp.dtype(_KV_DTYPES[config.kv_cache_dtype]),
        decoder=decoder,
        scheduler=_scheduler_config(config, checkpoint, platform),
        page_sizes=(config.page_size,) if config.page_size else _PAGE_SIZES.get(platform, (128,)),
        mesh=mesh,
    )


def check_fit(design: ModelLayout, tp_size: int, ep_size: int) -> None:
    """Raise LaunchError where a copy of the model cannot be split over `tp_size` devices, `ep_size` of its experts."""
    mesh = mesh_shape(tp_size, ep_size, design.mesh.shape[DATA])
    copies = kv_head_replication(design.checkpoint, mesh)
    model = msgspec.structs.replace(design.checkpoint, num_kv_heads=design.checkpoint.num_kv_heads * copies)
    decoder = design.architecture.build(DecoderArgs(model, design.dtype))
    _check_blocks(decoder, mesh, copies)


def _check_blocks(decoder: Decoder, mesh: Mesh | AbstractMesh, copies: int) -> None:
    """Raise LaunchError where devices would share a block of a quantised weight."""
    quantization = decoder.config.quantization
    if quantization is None:
        return
    for path, spec in decoder.param_specs.items():
        if (*path[:-1], "scale") not in decoder.param_specs or path[-1] != "weight":
            continue
        parts = partition_spec(spec.axes, spec.shape, mesh)
        sizes = (spec.shape[-2], spec.num_inputs)
        rows, columns = quantization.block
        columns = columns or spec.num_inputs // spec.shape[-1]
        # Devices that have parts of whole rows all have their factors.
        for size, axes, block in zip(sizes, parts[-2:], (rows, columns), strict=True):
            num_parts = 1 if axes is None else math.prod(mesh.shape[axis] for axis in np.atleast_1d(axes))
            if num_parts > 1 and size % (num_parts * block):
                raise LaunchError(
                    f"{'.'.join(path)}: {size} numbers in blocks of {block} do not divide over {num_parts} devices; "
                    "try another --tp-size or --ep-size"
                )
    head_dim, rows = decoder.config.head_dim, quantization.block[0]
    if copies > 1 and decoder.config.latent is None and head_dim % rows:
        raise LaunchError(
            f"key heads of {head_dim} do not divide into quantised blocks of {rows} rows, so they cannot be repeated: "
            "try a lower --tp-size"
        )


def layout_engine(
    config: EngineConfig, design: ModelLayout, pool_bytes: int, adapters: LoraPoolLayout | None = None
) -> EngineLayout:
    """Size the pool and shape the step.

    Args:
        config: the settings.
        design: the model.
        pool_bytes: for keys and values, on each device.
        adapters: slots of LoRA adapters, if they can be asked for.

    Raises:
        LaunchError: the pool is too small, or the attention backend that was named cannot serve the model.
    """
    page_size, scheduler = _fit_table(config, design)
    one_page = _attention(config, design, page_size, 1)
    page_bytes = cache_bytes(one_page.backend, design.mesh)
    room = layout_workspace(design.model, one_page, design.mesh, scheduler, pool_bytes // _WORKSPACE_DIVISOR)
    if room is not None:
        pool_bytes -= cache_bytes(room.backend, design.mesh)
    if config.max_total_tokens is not None:
        num_pages = config.max_total_tokens // page_size
    else:
        # More than every row at full length is of use to the prefix cache only.
        most = 4 * scheduler.max_rows * -(-scheduler.context_length // page_size)
        num_pages = min(pool_bytes // page_bytes, most)
    cache = CacheConfig(page_size=page_size, num_pages=num_pages, prefix_caching=config.prefix_caching)
    scheduler = _fit_context(scheduler, cache)
    chosen = _attention(config, design, page_size, num_pages)
    sampler = choose_sampler(design.mesh)
    experts = choose_grouped_matmul(_expert_shapes(design), design.mesh)
    _tell("attention", *chosen[1:])
    _tell("sampling", *sampler[1:])
    if design.model.experts is not None:
        _tell("experts", *experts[1:])
    lora = _LoraChoice() if adapters is None else _choose_lora(design, adapters)
    linear_matmul, linears = _choose_linears(design)
    layout = BatchLayout(
        max_rows=scheduler.max_rows,
        page_size=page_size,
        num_pages=num_pages,
        pages_per_row=-(-scheduler.context_length // page_size),
        vocab_size=design.model.vocab_size,
    )
    on_cpu = design.mesh.devices.flat[0].platform == "cpu"
    buckets = make_buckets(scheduler, CPU_STEPS if on_cpu else ACCELERATOR_STEPS)
    step = StepModel(
        decoder=_decoder_of_cache(config, design),
        attention=chosen.backend,
        sampler=sampler.sample,
        mesh=design.mesh,
        layout=layout,
        buckets=buckets,
        adapters=adapters,
        lora=lora.matmul,
        lora_groups=lora.groups,
        lora_experts=lora.experts,
        grouped_matmul=experts.matmul,
        linear_matmul=linear_matmul,
        linears=linears,
        mla_workspace=room,
    )
    return EngineLayout(cache, num_pages * page_bytes, scheduler, chosen.name, step)


def _decoder_of_cache(config: EngineConfig, design: ModelLayout) -> Decoder:
    """The model with what its cache needs: integers need factors, which are measured once the weights are there."""
    if design.kv_dtype != jnp.int8:
        return design.decoder
    model = msgspec.structs.replace(design.model, cache_scales=True)
    return design.architecture.build(DecoderArgs(model, design.dtype, batch_invariant=config.deterministic))


def _expert_shapes(design: ModelLayout) -> set[ExpertShape]:
    """Of the experts' matrices on one device."""
    quantization = design.model.quantized("experts")
    return {
        _shape_on_device(design, spec, quantization)
        for path, spec in design.decoder.param_specs.items()
        if spec.of_experts and path[-1] == "weight"
    }


def _choose_linears(design: ModelLayout) -> tuple[GroupedMatmul, tuple[Path, ...]]:
    """The kernel of quantised linear maps, and those that it can multiply; the compiler has the others."""
    chosen = {
        path[:-1]: choose_grouped_matmul([_shape_on_device(design, spec, design.model.quantization)], design.mesh)
        for path, spec in design.decoder.param_specs.items()
        if path[-1] == "weight" and spec.stored is not None and not (spec.of_experts or spec.taken_apart)
    }
    _tell_by_module("{}", chosen)
    by_kernel = {path: each.matmul for path, each in chosen.items() if each.name != "xla"}
    return next(iter(by_kernel.values()), XlaGroupedMatmul()), tuple(by_kernel)


class _LoraChoice(NamedTuple):
    """How updates of adapters are computed; see `StepModel`."""

    matmul: LoraMatmul = XlaLora()
    groups: tuple[Path, ...] = ()
    experts: GroupedMatmul = XlaGroupedMatmul()


def _choose_lora(design: ModelLayout, adapters: LoraPoolLayout) -> _LoraChoice:
    """The kernels of adapters, and the groups of modules that they can serve; portable XLA has the others."""
    chosen = {
        group: choose_lora(modules, design.mesh)
        for group, modules in lora_modules(design.decoder, adapters, design.mesh).items()
    }
    _tell_by_module("LoRA of {}", chosen)
    by_kernel = {group: each.matmul for group, each in chosen.items() if each.name != "xla"}
    experts = XlaGroupedMatmul()
    if shapes := lora_expert_shapes(design.decoder, adapters, design.mesh):
        choice = choose_grouped_matmul(shapes, design.mesh)
        _tell("LoRA of experts", *choice[1:])
        experts = choice.matmul
    return _LoraChoice(next(iter(by_kernel.values()), XlaLora()), tuple(by_kernel), experts)


def _tell(op: str, name: str, reason: str, is_fallback: bool) -> None:
    """Log what was chosen, and why."""
    logger.log(logging.WARNING if is_fallback else logging.INFO, "%s backend: %s, %s", op, name, reason)


def _tell_by_module(op: str, chosen: Mapping[Path, tuple[Any, str, str, bool]]) -> None:
    """Log what was chosen for modules, those of one kind together."""
    for kind in dict.fromkeys(each[1:] for each in chosen.values()):
        modules = (".".join(path).removeprefix("layers.") for path, each in chosen.items() if each[1:] == kind)
        _tell(op.format(", ".join(modules)), *kind)


def _shape_on_device(design: ModelLayout, spec: ParamSpec, quantization: QuantizationConfig | None) -> ExpertShape:
    """Of a matrix' part."""
    form = None if quantization is None else format_of(quantization)
    shard = spec.shard_shape(design.mesh)
    num_inputs = spec.num_inputs * shard[-1] // spec.shape[-1]
    return ExpertShape(shard[-2], num_inputs, design.dtype, form, quantization is not None and quantization.zeros)


def _fit_table(config: EngineConfig, design: ModelLayout) -> tuple[int, SchedulerConfig]:
    """The smallest page size whose page table, of all rows at full length, the device can hold.

    Where none is large enough the rows become fewer, unless their number was asked for.
    """
    scheduler = design.scheduler
    page_size, most_rows = 0, 0
    for page_size in design.page_sizes:
        limit = _attention(config, design, page_size, 1).backend.max_table_entries
        most_rows = scheduler.max_rows if limit is None else limit // -(-scheduler.context_length // page_size)
        if scheduler.max_rows <= most_rows:
            return page_size, scheduler
    if config.max_running_requests is not None or most_rows < 1:
        raise LaunchError(
            f"--max-running-requests {scheduler.max_rows} with --context-length {scheduler.context_length} is more "
            f"than the device's page table holds with pages of {page_size} tokens, which is {most_rows} requests: "
            "lower one, or raise --page-size"
        )
    logger.warning(
        "%d requests at once instead of %d: the device's page table holds no more of %d tokens each",
        most_rows,
        scheduler.max_rows,
        scheduler.context_length,
    )
    return page_size, msgspec.structs.replace(scheduler, max_rows=most_rows)


def _attention(config: EngineConfig, design: ModelLayout, page_size: int, num_pages: int) -> ChosenAttention:
    model = design.model
    attention = AttentionConfig(
        num_layers=model.num_layers,
        num_q_heads=model.num_q_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        page_size=page_size,
        num_pages=num_pages,
        dtype=design.kv_dtype,
        scale=model.attention_scale or model.head_dim**-0.5,
        window=model.windows[0],
        value_dim=None if model.latent is None else model.latent.kv_rank,
        batch_invariant=config.deterministic,
    )
    try:
        return choose_attention(config.attention_backend, attention, design.mesh)
    except NotImplementedError as error:
        raise LaunchError(f"--attention-backend {config.attention_backend}: {error}") from None


def pick_dtype(config: EngineConfig, model: ModelConfig) -> jnp.dtype:
    """Dtype of weights and activations."""
    # float16 has too small a range for bfloat16 models and no fast path on TPU or CPU; `auto` avoids it.
    name = config.dtype if config.dtype != "auto" else model.dtype
    if config.dtype == "auto" and name == "float16":
        name = "bfloat16"
    return jnp.dtype(name)


def _scheduler_config(config: EngineConfig, model: ModelConfig, platform: str) -> SchedulerConfig:
    context_length = config.context_length or model.max_position
    if context_length > model.max_position:
        raise LaunchError(
            f"--context-length {context_length} is more than the {model.max_position} tokens the model is made for"
        )
    max_rows = config.max_running_requests or (32 if platform == "cpu" else 256)
    max_step_tokens = config.chunked_prefill_size or (512 if platform == "cpu" else 2048)
    return SchedulerConfig(
        max_rows=max_rows,
        max_step_tokens=max(max_step_tokens, max_rows) if config.chunked_prefill_size is None else max_step_tokens,
        context_length=context_length,
        policy=config.schedule_policy,
    )


def _fit_context(scheduler: SchedulerConfig, cache: CacheConfig) -> SchedulerConfig:
    """A single request must fit the pool, or it could never finish."""
    pool_tokens = cache.page_size * cache.num_pages
    if scheduler.context_length <= pool_tokens:
        return scheduler
    logger.warning("context length cut from %d to the pool's %d tokens", scheduler.context_length, pool_tokens)
    return msgspec.structs.replace(scheduler, context_length=pool_tokens)
