"""Builds an engine from an `EngineConfig`: checkpoint, mesh, sizes, weights, compiled programs."""

import contextlib
import ctypes
import logging
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from checkpoints.adapters import read_peft
from checkpoints.orbax_adapters import is_orbax_adapter
from checkpoints.source import CheckpointError, TensorSource
from jaxserve.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from jaxserve.distributed.follower import Follower
from jaxserve.distributed.hosts import accept_followers, join_leader
from jaxserve.distributed.leader import Followers, LeadingRunner
from jaxserve.distributed.rendezvous import model_digest
from jaxserve.engine.engine import Engine
from jaxserve.engine.messages import EngineInfo
from jaxserve.errors import AdapterError, LaunchError
from jaxserve.layout.expert_groups import choose_ep_size
from jaxserve.layout.layout import ModelLayout, layout_engine, layout_model
from jaxserve.layout.memory import DEVICE_MEM_FRACTION
from jaxserve.loading.checkpoint import OrbaxCheckpoint, open_checkpoint
from jaxserve.loading.weights import load_weights, quantized_as, restore_weights
from jaxserve.lora.merge import merge_adapter
from jaxserve.lora.pool import lora_pool_bytes
from jaxserve.lora.reader import AdapterReader
from jaxserve.lora.startup import StartupAdapters, read_startup_adapters
from jaxserve.lora.store import AdapterStore
from jaxserve.models.param_spec import Weights
from jaxserve.parallel.mesh import make_mesh
from jaxserve.request import AdapterSource
from jaxserve.runner.compile_counter import CompileCounter
from jaxserve.runner.kv_calibration import with_kv_scales
from jaxserve.runner.runner import ModelRunner
from jaxserve.runner_protocol import Runner
from jaxserve.scheduling.adapter_slots import AdapterSlots
from jaxserve.scheduling.data_parallel import DataParallelScheduler
from jaxserve.scheduling.scheduler import Scheduler
from kernels_pallas.dispatch import lora_rank_multiple

logger = logging.getLogger(__name__)

ProgressBar: TypeAlias = Callable[[Iterable[Any], str, int], Iterable[Any]]

# Waits until every host has called it; returns the minimum of their values.
MinOverHosts: TypeAlias = Callable[[int], int]

_CPU_POOL_BYTES = 512 << 20


class BuiltRunner(NamedTuple):
    """A runner that is not warmed up yet, and the sizes that the scheduler must respect."""

    runner: ModelRunner
    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    dtype: jnp.dtype
    adapters: StartupAdapters | None


class BuiltEngine(NamedTuple):
    """An engine that is ready for requests. `followers` are the other hosts; None on a single host."""

    engine: Engine
    info: EngineInfo
    compiles: CompileCounter
    followers: Followers | None = None


class Phase:
    """Logs the duration of a start-up phase when it ends."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.detail = ""

    def __enter__(self) -> "Phase":
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            logger.info("%s: %.1f s%s", self._name, self.seconds, self.detail)

    @property
    def seconds(self) -> float:
        """Seconds since the phase began."""
        return time.perf_counter() - self._start


def build_engine(config: EngineConfig, bar: ProgressBar) -> BuiltEngine:
    """Load the model and compile its steps; when this returns, nothing is left to compile.

    Raises:
        LaunchError: flags, checkpoint and devices do not fit together.
    """
    _configure_jax(config)
    compiles = CompileCounter()
    followers: Followers | None = None
    with _open(config) as source:
        if config.nnodes > 1:
            followers = accept_followers(config, _digest(source, config))
        min_over_hosts = _alone if followers is None else followers.min_over_hosts
        built = _build_runner(config, source, bar, min_over_hosts)
    _warm_up(built, bar, min_over_hosts)
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
        adapters=None if config.lora is None else tuple(config.lora.paths),
    )
    runner = built.runner if followers is None else LeadingRunner(built.runner, followers)
    slots = AdapterSlots(config.lora.max_loras_per_batch, config.lora.eviction_policy) if config.lora else None
    store = None if slots is None else _adapter_store(config, built, runner, slots)
    schedulers = [Scheduler(built.scheduler, built.cache, slots) for _ in range(config.dp_size)]
    engine = Engine(runner, DataParallelScheduler(schedulers), built.model.vocab_size, store)
    return BuiltEngine(engine, info, compiles, followers)


def _adapter_store(config: EngineConfig, built: BuiltRunner, runner: Runner, slots: AdapterSlots) -> AdapterStore:
    assert config.lora is not None
    assert built.adapters is not None
    store = AdapterStore(built.adapters.reader, runner, slots, config.lora.max_loaded)
    for name, folder in config.lora.paths.items():
        source = AdapterSource(key=name, folder=folder, pinned=name in config.lora.pinned)
        store.add(source, built.adapters.by_name[name])
    return store


def build_follower(config: EngineConfig, bar: ProgressBar) -> Follower:
    """Join host 0, load the model and compile its steps.

    Raises:
        LaunchError: flags, checkpoint and devices do not fit together, or host 0 refuses.
    """
    _configure_jax(config)
    with _open(config) as source:
        leader = join_leader(config, _digest(source, config))
        built = _build_runner(config, source, bar, leader.min_over_hosts)
    _warm_up(built, bar, leader.min_over_hosts)
    return Follower(built.runner, leader)


def _alone(value: int) -> int:
    """`MinOverHosts` for a single host."""
    return value


def _warm_up(built: BuiltRunner, bar: ProgressBar, min_over_hosts: MinOverHosts) -> None:
    with Phase("compilation") as phase:
        built.runner.compile(lambda buckets: bar(buckets, "compiling steps", built.runner.num_programs))
        min_over_hosts(0)  # wait for slower hosts: collectives of CPU devices time out after 30 s
        built.runner.warm_up()
        phase.detail = f", {built.runner.num_programs} programs"
    _trim_heap()


def _trim_heap() -> None:
    """Return the memory that loading and compiling freed to the system; glibc would keep it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _configure_jax(config: EngineConfig) -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if config.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache_dir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def _open(config: EngineConfig) -> Generator[TensorSource | OrbaxCheckpoint, None, None]:
    """Open the checkpoint; a `CheckpointError` in the context becomes a `LaunchError`."""
    source = open_checkpoint(Path(config.model_path))
    try:
        yield source
    except CheckpointError as error:
        raise LaunchError(str(error)) from None
    finally:
        source.close()


def _digest(source: TensorSource | OrbaxCheckpoint, config: EngineConfig) -> str:
    """Return `model_digest`, without the tensors of an Orbax folder, which cannot be read before they are restored."""
    tensors = None if isinstance(source, OrbaxCheckpoint) else source
    merged = [] if config.merge_lora is None else [config.merge_lora]
    served = [] if config.lora is None else list(config.lora.paths.values())
    # Reading an Orbax adapter would start JAX before the hosts are connected; such adapters are refused later.
    folders = [folder for folder in map(Path, merged + served) if not is_orbax_adapter(folder)]
    return model_digest(source.config, tensors, map(read_peft, folders))


def build_runner(config: EngineConfig, bar: ProgressBar) -> BuiltRunner:
    """Load the model and lay out its memory.

    Raises:
        LaunchError: flags, checkpoint and devices do not fit together.
    """
    with _open(config) as source:
        return _build_runner(config, source, bar, _alone)


def _build_runner(
    config: EngineConfig, source: TensorSource | OrbaxCheckpoint, bar: ProgressBar, min_over_hosts: MinOverHosts
) -> BuiltRunner:
    ep_size = choose_ep_size(config, source.config, jax.default_backend())
    layout = layout_model(config, source.config, make_mesh(config.tp_size, config.dp_size, ep_size))
    platform = layout.mesh.devices.flat[0].platform
    names = layout.architecture.tensor_names(layout.config)
    reader = AdapterReader(layout.decoder, names, config.nnodes)
    with Phase("weights") as phase:
        weights = _load(source, layout, bar)
        if config.merge_lora is not None:
            weights = _merge(weights, Path(config.merge_lora), reader)
        megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) / 1e6
        devices = f"{layout.mesh.size} {platform} device(s)"
        phase.detail = f", {megabytes:.0f} MB of {layout.dtype} on {devices}, {megabytes / phase.seconds:.0f} MB/s"
    first = None if config.lora is None else read_startup_adapters(config.lora, reader, lora_rank_multiple(layout.mesh))
    lora_pool = None if first is None else first.layout
    slot_bytes = 0 if lora_pool is None else lora_pool_bytes(layout.decoder, lora_pool, layout.mesh)
    # All hosts run the same shapes, so the one with the least free memory decides.
    engine = layout_engine(config, layout, min_over_hosts(_pool_bytes(config, platform, slot_bytes)), lora_pool)
    logger.info(
        "key/value pool: %d pages of %d tokens, %.0f MB on each device",
        engine.cache.num_pages,
        engine.cache.page_size,
        engine.pool_bytes / 1e6,
    )
    if layout.decoder.args.parallelism.kv_scales:
        with Phase("KV scales"):
            weights = with_kv_scales(engine.step, weights, lambda: min_over_hosts(0))
    runner = ModelRunner(engine.step, weights)
    for name, adapter in first.by_name.items() if first is not None else ():
        runner.add_adapter(name, adapter)
    return BuiltRunner(runner, layout.config, engine.cache, engine.scheduler, layout.dtype, first)


def _load(source: TensorSource | OrbaxCheckpoint, layout: ModelLayout, bar: ProgressBar) -> Weights:
    if isinstance(source, OrbaxCheckpoint):
        return restore_weights(source.folder, layout.decoder, layout.mesh)
    names = layout.architecture.tensor_names(layout.config)
    return load_weights(
        quantized_as(source, layout.decoder, names),
        layout.decoder,
        names,
        layout.mesh,
        lambda paths: bar(paths, "loading weights", len(layout.decoder.param_specs)),
    )


def _merge(weights: Weights, adapter: Path, reader: AdapterReader) -> Weights:
    try:
        return merge_adapter(weights, reader.read(adapter))
    except AdapterError as error:
        raise LaunchError(f"--merge-lora: {error}") from None


def _pool_bytes(config: EngineConfig, platform: str, slot_bytes: int) -> int:
    """Return the bytes for the key/value pool on one device, which must also hold `slot_bytes` of LoRA slots."""
    stats = jax.local_devices()[0].memory_stats() if platform != "cpu" else None
    if stats is None:
        return _CPU_POOL_BYTES if config.mem_fraction_static is None else _host_pool_bytes(config)
    free = stats["bytes_limit"] - stats["bytes_in_use"] - slot_bytes
    return int(free * (config.mem_fraction_static or DEVICE_MEM_FRACTION))


def _host_pool_bytes(config: EngineConfig) -> int:
    """Return the pool's bytes on a CPU device, which gets an equal share of the host's memory."""
    assert config.mem_fraction_static is not None
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(
        int(meminfo["MemAvailable"].split()[0]) * 1024 * config.mem_fraction_static / (config.tp_size * config.dp_size)
    )
