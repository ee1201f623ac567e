"""Lays a model out on a mesh from its settings and its config alone: reads no weights, allocates no memory.

The engine is built from such a layout, and `jaxserve.plan` compiles it for devices that are not present.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import msgspec
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxserve.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from jaxserve.errors import LaunchError
from jaxserve.layers.args import DecoderArgs
from jaxserve.layout.backends import choose_attention_backend, choose_backends
from jaxserve.layout.mla_prefill import layout_workspace
from jaxserve.lora.pool import LoraPoolLayout
from jaxserve.models.architecture import Architecture
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf.quantization import with_requested
from jaxserve.models.registry import find_architecture
from jaxserve.parallel.mesh import kv_head_replication, mesh_shape, partition_spec
from jaxserve.parallel.parallelism import Parallelism
from jaxserve.runner.batch import BatchLayout
from jaxserve.runner.buckets import ACCELERATOR_SHAPES, CPU_SHAPES, make_buckets
from jaxserve.runner.programs import StepModel
from kernels_pallas.dispatch import BackendName, Choice
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionConfig
from kernels_pallas.paged_attention.common.head_shards import cache_bytes
from kernels_pallas.shards import DATA, model_size

logger = logging.getLogger(__name__)

# The workspace of MLA prompts takes at most the pool's size divided by this.
_WORKSPACE_DIVISOR = 32

# Tokens per page, by platform. Larger pages waste more memory at the end of a row; smaller ones take more copies.
_PAGE_SIZES = {"cpu": (64,), "tpu": (128, 256)}
_KV_DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp8_e4m3": "float8_e4m3fn", "int8": "int8"}


class ModelLayout(NamedTuple):
    """A model on a mesh.

    Attributes:
        architecture: its entry in the registry.
        decoder: the model.
        kv_dtype: dtype of cached keys and values.
        scheduler: limits of a step.
        page_sizes: candidate page sizes in tokens; the smallest whose page table fits the device is used.
        mesh: the devices; see `jaxserve.parallel.mesh`.
    """

    architecture: Architecture
    decoder: Decoder
    kv_dtype: jnp.dtype
    scheduler: SchedulerConfig
    page_sizes: tuple[int, ...]
    mesh: Mesh

    @property
    def config(self) -> ModelConfig:
        """The model, as its checkpoint describes it."""
        return self.decoder.config

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of weights and activations."""
        return self.decoder.dtype

    @property
    def device_weight_bytes(self) -> int:
        """Bytes of the weights on each device."""
        return sum(spec.shard_bytes(self.mesh) for spec in self.decoder.param_specs.values())


class EngineLayout(NamedTuple):
    """A model with its memory laid out.

    Attributes:
        cache: sizes of the KV pool of one replica.
        pool_bytes: bytes of the KV pool on each device.
        scheduler: limits of a step, with the context length cut to the capacity of the pool.
        attention_name: name of the attention backend.
        step: the model that the step's programs are compiled from.
    """

    cache: CacheConfig
    pool_bytes: int
    scheduler: SchedulerConfig
    attention_name: str
    step: StepModel


def layout_model(config: EngineConfig, hf_config: Mapping[str, Any], mesh: Mesh) -> ModelLayout:
    """Lay a model out on a mesh.

    Args:
        config: the settings.
        hf_config: the parsed `config.json`.
        mesh: the devices, present or not.

    Raises:
        LaunchError: settings, model and devices do not fit together.
    """
    architecture = find_architecture(hf_config)
    model = with_requested(architecture.model_config(hf_config), hf_config, config.quantization)
    if config.dp_attention and model.moe is None:
        raise LaunchError("--enable-dp-attention: the model has no experts for its replicas to share")
    if config.merge_lora is not None and model.quantization is not None:
        raise LaunchError("--merge-lora: the model's weights are quantised: serve the adapter with --lora-paths")
    dtype = pick_dtype(config, model)
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else jnp.dtype(_KV_DTYPES[config.kv_cache_dtype])
    parallelism = Parallelism(
        kv_head_replication=kv_head_replication(model, mesh, shared_experts=config.dp_attention),
        shared_experts=config.dp_attention,
        kv_scales=kv_dtype == jnp.int8,
    )
    decoder = architecture.build(DecoderArgs(model, dtype, parallelism, batch_invariant=config.deterministic))
    _check_blocks(decoder, mesh)
    if model.vocab_size % model_size(mesh):
        logger.warning("vocabulary of %d does not divide by %d: it is replicated", model.vocab_size, model_size(mesh))
    platform = mesh.devices.flat[0].platform
    return ModelLayout(
        architecture=architecture,
        decoder=decoder,
        kv_dtype=kv_dtype,
        scheduler=_scheduler_config(config, model, platform),
        page_sizes=(config.page_size,) if config.page_size else _PAGE_SIZES.get(platform, (128,)),
        mesh=mesh,
    )


def check_fit(layout: ModelLayout, tp_size: int, ep_size: int) -> None:
    """Raise LaunchError if a replica cannot be split over `tp_size` devices and `ep_size` groups of experts."""
    mesh = mesh_shape(tp_size, ep_size, layout.mesh.shape[DATA])
    shared = layout.decoder.args.parallelism.shared_experts
    replication = kv_head_replication(layout.config, mesh, shared_experts=shared)
    parallelism = Parallelism(kv_head_replication=replication, shared_experts=shared)
    _check_blocks(layout.architecture.build(DecoderArgs(layout.config, layout.dtype, parallelism)), mesh)


def _check_blocks(decoder: Decoder, mesh: Mesh | AbstractMesh) -> None:
    """Raise LaunchError if devices would share a block of a quantised weight."""
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
        # If a scale covers a whole row, all devices that hold parts of the row hold its scale.
        for size, axes, block in zip(sizes, parts[-2:], (rows, columns), strict=True):
            num_parts = 1 if axes is None else math.prod(mesh.shape[axis] for axis in np.atleast_1d(axes))
            if num_parts > 1 and size % (num_parts * block):
                raise LaunchError(
                    f"{'.'.join(path)}: {size} elements in blocks of {block} do not divide over {num_parts} devices; "
                    "try another --tp-size or --ep-size"
                )
    head_dim, rows = decoder.config.head_dim, quantization.block[0]
    replicated = decoder.args.parallelism.kv_head_replication > 1
    if replicated and decoder.config.mla is None and head_dim % rows:
        raise LaunchError(
            f"key heads of {head_dim} do not divide into quantised blocks of {rows} rows, so they cannot be repeated: "
            "try a lower --tp-size"
        )


def layout_engine(
    config: EngineConfig, layout: ModelLayout, pool_bytes: int, lora_pool: LoraPoolLayout | None = None
) -> EngineLayout:
    """Size the KV pool, and choose the backends and buckets of a step.

    Args:
        config: the settings.
        layout: the model.
        pool_bytes: bytes for keys and values on each device, the workspace of MLA prompts included.
        lora_pool: slots for LoRA adapters, if requests may name adapters.

    Raises:
        LaunchError: the pool is too small, or the named attention backend cannot serve the model.
    """
    page_size, scheduler = _fit_table(config, layout)
    one_page = _attention(config, layout, page_size, 1)
    page_bytes = cache_bytes(one_page.impl, layout.mesh)
    workspace = layout_workspace(layout.config, one_page, layout.mesh, scheduler, pool_bytes // _WORKSPACE_DIVISOR)
    if workspace is not None:
        pool_bytes -= cache_bytes(workspace.backend, layout.mesh)
    if config.max_total_tokens is not None:
        num_pages = config.max_total_tokens // page_size
    else:
        # Pages beyond those of all rows at full length only serve the prefix cache.
        max_pages = 4 * scheduler.max_rows * -(-scheduler.context_length // page_size)
        num_pages = min(pool_bytes // page_bytes, max_pages)
    cache = CacheConfig(page_size=page_size, num_pages=num_pages, prefix_caching=config.prefix_caching)
    scheduler = _fit_context(scheduler, cache)
    attention = _attention(config, layout, page_size, num_pages)
    # Whether a token's step is small depends on other requests.
    exact = config.activation_quantization == "none" or config.deterministic
    chosen = choose_backends(layout.decoder, layout.mesh, attention, lora_pool, exact=exact)
    shapes = CPU_SHAPES if layout.mesh.devices.flat[0].platform == "cpu" else ACCELERATOR_SHAPES
    step = StepModel(
        decoder=layout.decoder,
        backends=chosen.backends,
        mesh=layout.mesh,
        layout=BatchLayout(
            max_rows=scheduler.max_rows,
            page_size=page_size,
            num_pages=num_pages,
            pages_per_row=-(-scheduler.context_length // page_size),
            vocab_size=layout.config.vocab_size,
        ),
        buckets=make_buckets(scheduler, shapes),
        sample_modes=shapes.sample_modes,
        lora_pool=lora_pool,
        lora_groups=chosen.lora_groups,
        linears=chosen.linears,
        mla_workspace=workspace,
    )
    return EngineLayout(cache, num_pages * page_bytes, scheduler, attention.name, step)


def _fit_table(config: EngineConfig, layout: ModelLayout) -> tuple[int, SchedulerConfig]:
    """Return the smallest page size with which the page table of all rows at full length fits the device.

    If no page size is large enough, the number of rows is lowered, unless the user set it.
    """
    scheduler = layout.scheduler
    page_size, max_rows = 0, 0
    for page_size in layout.page_sizes:
        limit = _attention(config, layout, page_size, 1).impl.max_table_entries
        max_rows = scheduler.max_rows if limit is None else limit // -(-scheduler.context_length // page_size)
        if scheduler.max_rows <= max_rows:
            return page_size, scheduler
    if config.max_running_requests is not None or max_rows < 1:
        raise LaunchError(
            f"--max-running-requests {scheduler.max_rows} with --context-length {scheduler.context_length} is more "
            f"than the device's page table holds with pages of {page_size} tokens, which is {max_rows} requests: "
            "lower one, or raise --page-size"
        )
    logger.warning(
        "%d requests at once instead of %d: the device's page table holds no more of %d tokens each",
        max_rows,
        scheduler.max_rows,
        scheduler.context_length,
    )
    return page_size, msgspec.structs.replace(scheduler, max_rows=max_rows)


def _attention(config: EngineConfig, layout: ModelLayout, page_size: int, num_pages: int) -> Choice[AttentionBackend]:
    model = layout.config
    attention = AttentionConfig(
        num_layers=model.num_layers,
        num_q_heads=model.num_q_heads,
        num_kv_heads=layout.decoder.args.num_kv_heads,
        head_dim=model.head_dim,
        page_size=page_size,
        num_pages=num_pages,
        dtype=layout.kv_dtype,
        scale=model.attention_scale or model.head_dim**-0.5,
        window=model.windows[0],
        value_dim=None if model.mla is None else model.mla.kv_lora_rank,
        batch_invariant=config.deterministic,
    )
    name: BackendName = config.attention_backend
    return choose_attention_backend(name, attention, layout.mesh)


def pick_dtype(config: EngineConfig, model: ModelConfig) -> jnp.dtype:
    """Return the dtype of weights and activations."""
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
    """Cut the context length to the pool's tokens, since a request that does not fit could never finish."""
    pool_tokens = cache.page_size * cache.num_pages
    if scheduler.context_length <= pool_tokens:
        return scheduler
    logger.warning("context length cut from %d to the pool's %d tokens", scheduler.context_length, pool_tokens)
    return msgspec.structs.replace(scheduler, context_length=pool_tokens)
