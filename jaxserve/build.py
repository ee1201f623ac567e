"""From an `EngineConfig` to a running engine: checkpoint, mesh, sizes, weights, programs."""

import contextlib
import ctypes
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import msgspec

from checkpoints.gguf import GGUFCheckpoint
from checkpoints.huggingface import HuggingFaceCheckpoint, read_json
from checkpoints.orbax_io import is_orbax
from checkpoints.source import CheckpointError, TensorSource
from jaxserve.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from jaxserve.engine import Engine
from jaxserve.errors import LaunchError
from jaxserve.mesh import kv_head_copies, make_mesh
from jaxserve.messages import EngineInfo
from jaxserve.models.architecture import BuildModel
from jaxserve.models.registry import find_architecture
from jaxserve.runner.batch import BatchLayout
from jaxserve.runner.buckets import ACCELERATOR_STEPS, CPU_STEPS, make_buckets
from jaxserve.runner.compile_counter import CompileCounter
from jaxserve.runner.programs import StepModel
from jaxserve.runner.runner import ModelRunner
from jaxserve.runner.weights import load_weights, restore_weights
from jaxserve.scheduling.data_parallel import DataParallelScheduler
from jaxserve.scheduling.scheduler import Scheduler
from kernels_pallas.paged_attention.api import AttentionConfig
from kernels_pallas.paged_attention.xla import XlaAttention

logger = logging.getLogger(__name__)

ProgressBar: TypeAlias = Callable[[Iterable[Any], str, int], Iterable[Any]]

_CPU_POOL_BYTES = 512 << 20
_DEVICE_MEM_FRACTION = 0.88


class BuiltRunner(NamedTuple):
    """A runner that has yet to warm up, and the sizes the scheduler must keep to."""

    runner: ModelRunner
    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    dtype: jnp.dtype


class BuiltEngine(NamedTuple):
    """An engine that is ready for requests."""

    engine: Engine
    info: EngineInfo
    compiles: CompileCounter


class Phase:
    """Logs one line with its seconds when a start-up phase ends."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.detail = ""

    def __enter__(self) -> "Phase":
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            logger.info("%s: %.1f s%s", self._name, time.perf_counter() - self._start, self.detail)


class OrbaxCheckpoint(NamedTuple):
    """A folder that `scripts/convert_checkpoint.py` wrote; its weights are restored as a tree, not by name."""

    folder: Path
    config: Mapping[str, Any]

    def close(self) -> None:
        """Nothing is open."""


def open_checkpoint(path: Path) -> TensorSource | OrbaxCheckpoint:
    """Open a model folder, an Orbax folder or a `.gguf` file.

    Raises:
        LaunchError: it cannot be read.
    """
    try:
        if path.suffix == ".gguf":
            return GGUFCheckpoint(path)
        if is_orbax(path):
            return OrbaxCheckpoint(path, read_json(path / "config.json"))
        return HuggingFaceCheckpoint(path)
    except CheckpointError as error:
        raise LaunchError(str(error)) from None


def build_engine(config: EngineConfig, bar: ProgressBar) -> BuiltEngine:
    """Load the model and compile its steps; when this returns, nothing is left to compile.

    Raises:
        LaunchError: flags, checkpoint and devices do not fit together.
    """
    _configure_jax(config)
    compiles = CompileCounter()
    built = build_runner(config, bar)
    with Phase("compilation") as phase:
        built.runner.warm_up(lambda buckets: bar(buckets, "compiling steps", built.runner.num_programs))
        phase.detail = f", {built.runner.num_programs} programs"
    _trim_heap()
    compiles.mark_ready()
    device = jax.devices()[0]
    info = EngineInfo(
        architecture=built.model.architecture,
        vocab_size=built.model.vocab_size,
        context_length=built.scheduler.context_length,
        max_rows=built.scheduler.max_rows * config.dp_size,
        page_size=built.cache.page_size,
        num_pages=built.cache.num_pages * config.dp_size,
        dtype=str(built.dtype),
        device=f"{config.dp_size * config.tp_size} x {device.platform} {device.device_kind}",
        eos_token_ids=built.model.eos_token_ids,
    )
    schedulers = [Scheduler(built.scheduler, built.cache) for _ in range(config.dp_size)]
    return BuiltEngine(Engine(built.runner, DataParallelScheduler(schedulers), built.model.vocab_size), info, compiles)


def _trim_heap() -> None:
    """Give what loading and compiling freed back to the system; glibc keeps it otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _configure_jax(config: EngineConfig) -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if config.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache_dir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def build_runner(config: EngineConfig, bar: ProgressBar) -> BuiltRunner:
    """Load the model and lay out its memory.

    Raises:
        LaunchError: flags, checkpoint and devices do not fit together.
    """
    source = open_checkpoint(Path(config.model_path))
    try:
        architecture = find_architecture(source.config)
        checkpoint = architecture.read_config(source.config)
        mesh = make_mesh(config.tp_size, config.dp_size)
        platform = mesh.devices.flat[0].platform
        copies = kv_head_copies(checkpoint, config.tp_size)
        model = msgspec.structs.replace(checkpoint, num_kv_heads=checkpoint.num_kv_heads * copies)
        dtype = pick_dtype(config, checkpoint)
        scheduler = _scheduler_config(config, checkpoint, platform)
        decoder = architecture.build(BuildModel(model, dtype, batch_invariant=config.deterministic))
        with Phase("weights") as phase:
            if isinstance(source, OrbaxCheckpoint):
                weights = restore_weights(source.folder, decoder, checkpoint, mesh)
            else:
                names = architecture.tensor_names(checkpoint)
                weights = load_weights(
                    source,
                    decoder,
                    names,
                    checkpoint,
                    mesh,
                    lambda paths: bar(paths, "loading weights", len(names)),
                )
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
            phase.detail = f", {size / 1e6:.0f} MB of {dtype} on {mesh.size} {platform} device(s)"
    except CheckpointError as error:
        raise LaunchError(str(error)) from None
    finally:
        source.close()

    cache = _cache_config(config, model, scheduler, dtype, platform)
    scheduler = _fit_context(scheduler, cache)
    attention = XlaAttention(
        AttentionConfig(
            num_layers=model.num_layers,
            num_q_heads=model.num_q_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            page_size=cache.page_size,
            num_pages=cache.num_pages,
            dtype=dtype,
            scale=model.head_dim**-0.5,
            window=model.sliding_window,
            batch_invariant=config.deterministic,
        ),
        mesh,
    )
    logger.info("attention backend: xla, the portable one (no kernel is built for %s yet)", platform)
    layout = BatchLayout(
        max_rows=scheduler.max_rows,
        page_size=cache.page_size,
        num_pages=cache.num_pages,
        pages_per_row=-(-scheduler.context_length // cache.page_size),
        vocab_size=model.vocab_size,
    )
    buckets = make_buckets(scheduler, CPU_STEPS if platform == "cpu" else ACCELERATOR_STEPS)
    step = StepModel(decoder, attention, mesh, layout, buckets)
    return BuiltRunner(ModelRunner(step, weights), checkpoint, cache, scheduler, dtype)


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


def _cache_config(
    config: EngineConfig, model: ModelConfig, scheduler: SchedulerConfig, dtype: jnp.dtype, platform: str
) -> CacheConfig:
    page_size = config.page_size or (64 if platform == "cpu" else 128)
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize
    if config.max_total_tokens is not None:
        num_pages = config.max_total_tokens // page_size
    else:
        num_pages = _pool_bytes(config, platform) * config.tp_size // (page_size * token_bytes)
        # More than every row at full length is of use to the prefix cache only.
        num_pages = min(num_pages, 4 * scheduler.max_rows * -(-scheduler.context_length // page_size))
    cache = CacheConfig(page_size=page_size, num_pages=num_pages, prefix_caching=config.prefix_caching)
    logger.info(
        "key/value pool: %d pages of %d tokens, %.0f MB",
        num_pages,
        page_size,
        num_pages * page_size * token_bytes / 1e6,
    )
    return cache


def _fit_context(scheduler: SchedulerConfig, cache: CacheConfig) -> SchedulerConfig:
    """A single request must fit the pool, or it could never finish."""
    pool_tokens = cache.page_size * cache.num_pages
    if scheduler.context_length <= pool_tokens:
        return scheduler
    logger.warning("context length cut from %d to the pool's %d tokens", scheduler.context_length, pool_tokens)
    return msgspec.structs.replace(scheduler, context_length=pool_tokens)


def _pool_bytes(config: EngineConfig, platform: str) -> int:
    """Bytes for the pool on one device."""
    stats = jax.devices()[0].memory_stats() if platform != "cpu" else None
    if stats is None:
        return _CPU_POOL_BYTES if config.mem_fraction_static is None else _host_pool_bytes(config)
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    return int(free * (config.mem_fraction_static or _DEVICE_MEM_FRACTION))


def _host_pool_bytes(config: EngineConfig) -> int:
    """A CPU "device" has its part of the one memory."""
    assert config.mem_fraction_static is not None
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(
        int(meminfo["MemAvailable"].split()[0]) * 1024 * config.mem_fraction_static / (config.tp_size * config.dp_size)
    )
