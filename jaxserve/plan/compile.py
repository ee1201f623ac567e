"""Compiles a model's step for devices that are not present, and adds up the memory that it needs."""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import msgspec

from jaxserve.config import EngineConfig, LoraConfig
from jaxserve.errors import LaunchError
from jaxserve.layout.expert_groups import choose_ep_size
from jaxserve.layout.layout import EngineLayout, ModelLayout, check_fit, layout_engine, layout_model
from jaxserve.layout.memory import DEVICE_MEM_FRACTION
from jaxserve.lora.pool import LoraPoolLayout, lora_pool_bytes
from jaxserve.lora.reader import AdapterReader
from jaxserve.lora.startup import lora_pool_layout
from jaxserve.parallel.mesh import mesh_of
from jaxserve.plan.decode_load import DecodeLoad, moved_bytes, needed_bytes
from jaxserve.plan.hlo import HloProgram, find_collectives
from jaxserve.plan.report import DecodeStep, Memory, Program, Report, bound
from jaxserve.plan.targets import Target, target_devices
from jaxserve.runner.buckets import ForwardShape
from jaxserve.runner.programs import StepPrograms
from kernels_pallas.dispatch import lora_rank_multiple
from kernels_pallas.shards import EXPERT, model_size

_COMPILE_THREADS = 2
# The next forward pass runs while tokens are sampled from the previous step's logits.
_STEPS_IN_FLIGHT = 2
# The fraction of a device's memory that weights may take when the report advises more devices.
_WEIGHTS_AT_MOST = 0.8
_FEWER_SLOTS = "adapter slots take memory, too: lower --max-loras-per-batch, --max-lora-rank, --lora-target-modules"
# For devices whose memory size is not known.
_UNKNOWN_POOL_BYTES = 512 << 20


# A function that lowers a program, and the loads for which its bytes are counted, the largest one first.
Job: TypeAlias = tuple[Callable[[], jax.stages.Lowered], Sequence[DecodeLoad]]


class Outcome(NamedTuple):
    """The compiled programs, or the compiler's error if it ran out of memory.

    Attributes:
        moved: bytes that a device moves in decode steps, for loads whose programs are accounted for.
    """

    programs: list[Program]
    compile_s: float
    moved: Mapping[DecodeLoad, float]
    error: str | None = None


def make_plan(config: EngineConfig, hf_config: Mapping[str, Any], target: Target) -> Report:
    """Lay a model out on a target and compile its programs.

    Raises:
        LaunchError: settings, model and target do not fit together, or there is no compiler for the target.
    """
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    ep_size = choose_ep_size(config, hf_config, target.device.platform)
    mesh = mesh_of(target_devices(target), config.tp_size, config.dp_size, ep_size)
    layout = layout_model(config, hf_config, mesh)
    total = target.device.memory_bytes
    adapters = None if config.lora is None else adapter_slots(config.lora, layout)
    held = layout.device_weight_bytes + _lora_pool_bytes(layout, adapters)
    left = total - held if total else _UNKNOWN_POOL_BYTES
    if left <= 0:
        return _too_heavy(config, layout, adapters, target)
    engine = layout_engine(config, layout, int(left * (config.mem_fraction_static or DEVICE_MEM_FRACTION)), adapters)
    return _report(config, layout, engine, target, _compile(engine, _loads(engine)))


def adapter_slots(config: LoraConfig, layout: ModelLayout) -> LoraPoolLayout:
    """Return the pool layout for adapters that will be loaded later."""
    reader = AdapterReader(layout.decoder, layout.architecture.tensor_names(layout.config))
    return lora_pool_layout(config, reader, {}, lora_rank_multiple(layout.mesh))


def _lora_pool_bytes(layout: ModelLayout, adapters: LoraPoolLayout | None) -> int:
    return 0 if adapters is None else lora_pool_bytes(layout.decoder, adapters, layout.mesh)


class _Loads(NamedTuple):
    """The decode steps that bounds are computed for: many requests, and a single one."""

    together: DecodeLoad
    alone: DecodeLoad


def _loads(engine: EngineLayout) -> _Loads:
    """Return as many requests with half the context as the pool holds, and a single one."""
    kv_tokens = engine.cache.num_pages * engine.cache.page_size
    rows = max(1, min(engine.scheduler.max_rows, kv_tokens * 2 // engine.scheduler.context_length))
    context = max(1, engine.scheduler.context_length // 2)
    buckets = sorted(bucket.num_rows for bucket in engine.step.buckets if bucket.single_tokens)
    loads = (DecodeLoad(each, context, next(size for size in buckets if size >= each)) for each in (rows, 1))
    return _Loads(*loads)


def _compile(engine: EngineLayout, loads: _Loads) -> Outcome:
    """Compile every program of a step, two at a time."""
    step = StepPrograms(engine.step)
    lock = threading.Lock()
    moved: dict[DecodeLoad, float] = {}

    def compile_one(name: str, job: Job) -> Program:
        lower, own = job
        with lock:  # trace one program at a time
            lowered = lower()
        started = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - started
        memory: Any = compiled.memory_analysis()
        program = HloProgram(compiled.as_text() or "")
        moved.update((load, moved_bytes(engine, program, load)) for load in own)
        return Program(
            name=name,
            compile_s=seconds,
            temporary_bytes=memory.temp_size_in_bytes,
            code_bytes=memory.generated_code_size_in_bytes,
            kernels=len(program.kernels),
            collectives=dict(find_collectives(program).per_step),
            roofline_share=needed_bytes(engine, own[0]) / moved[own[0]] if own else None,
        )

    jobs: dict[str, Job] = {
        _name(shape): (partial(step.lower_forward, shape), _counted(engine, shape, loads))
        for shape in engine.step.shapes
    }
    for shape in engine.step.sample_shapes:
        name = f"sample {shape.num_rows} rows, {shape.mode.name.lower()}"
        jobs[name] = partial(step.lower_sample, shape), ()
    started = time.perf_counter()
    with ThreadPoolExecutor(_COMPILE_THREADS) as pool:
        try:
            programs = list(pool.map(compile_one, jobs, jobs.values()))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise LaunchError(f"the compiler for the target failed: {error}") from error
            return Outcome([], time.perf_counter() - started, {}, str(error).splitlines()[0])
    return Outcome(programs, time.perf_counter() - started, moved)


def _counted(engine: EngineLayout, shape: ForwardShape, loads: _Loads) -> Sequence[DecodeLoad]:
    """Return the loads of a decode step, all of its rows first, if kernels do the attention and no row has adapters."""
    if not shape.bucket.single_tokens or shape.adapted or engine.attention_name == "xla":
        return ()
    rows = shape.bucket.num_rows
    return DecodeLoad(rows, loads.alone.context, rows), *(load for load in loads if load.num_rows == rows)


def _name(shape: ForwardShape) -> str:
    kind = "forward with adapters" if shape.adapted else "forward, MHA prefill," if shape.mha_prefill else "forward"
    return f"{kind} {shape.bucket.num_tokens} tokens, {shape.bucket.num_rows} rows"


def _too_heavy(config: EngineConfig, layout: ModelLayout, adapters: LoraPoolLayout | None, target: Target) -> Report:
    """Return the report for weights and adapter slots that do not fit; nothing is compiled."""
    memory = Memory(
        total=target.device.memory_bytes,
        weights=layout.device_weight_bytes,
        adapters=_lora_pool_bytes(layout, adapters),
        kv_pool=0,
        state=0,
        temporaries=0,
        programs=0,
    )
    return Report(
        **_names(config, layout, target),
        attention_backend="not compiled",
        fits=False,
        advice=[_more_devices(layout, target), *([] if adapters is None else [_FEWER_SLOTS])],
        memory=memory,
        context_length=layout.scheduler.context_length,
        kv_tokens=0,
        full_requests=0,
        programs=[],
        compile_s=0.0,
        bounds=None,
    )


def _report(
    config: EngineConfig, layout: ModelLayout, engine: EngineLayout, target: Target, outcome: Outcome
) -> Report:
    memory = _memory(layout, engine, target, outcome.programs)
    kv_tokens = engine.cache.num_pages * engine.cache.page_size * config.dp_size
    context_length = layout.scheduler.context_length
    whole = engine.scheduler.context_length == context_length
    fits = outcome.error is None and memory.fits and (whole or config.context_length is None)
    steps = tuple(
        DecodeStep(load.rows, load.context, outcome.moved.get(load) or needed_bytes(engine, load))
        for load in _loads(engine)
    )
    computed = msgspec.structs.replace(layout.config, num_kv_heads=layout.decoder.args.num_kv_heads)
    return Report(
        **_names(config, layout, target),
        attention_backend=engine.attention_name,
        fits=fits,
        advice=_advice(layout, engine, target, outcome, memory),
        memory=memory,
        context_length=context_length,
        kv_tokens=kv_tokens,
        full_requests=config.dp_size * (engine.cache.num_pages * engine.cache.page_size // context_length),
        programs=outcome.programs,
        compile_s=outcome.compile_s,
        bounds=bound(computed, target.device, config.tp_size, (steps[0], steps[1])),
    )


def _names(config: EngineConfig, layout: ModelLayout, target: Target) -> dict[str, Any]:
    return {
        "model": f"{config.model_path} ({layout.config.architecture})",
        "target": target.text,
        "devices": config.tp_size * config.dp_size,
        "tp_size": config.tp_size,
        "dp_size": config.dp_size,
        "ep_size": layout.mesh.shape[EXPERT],
        "dp_attention": config.dp_attention,
        "dtype": str(layout.dtype),
        "kv_dtype": str(layout.kv_dtype),
    }


def _memory(layout: ModelLayout, engine: EngineLayout, target: Target, programs: list[Program]) -> Memory:
    step = StepPrograms(engine.step)
    state = sum(_device_bytes(leaf) for leaf in jax.tree.leaves(step.state_shapes()))
    logits = _device_bytes(step.logits_shape(engine.scheduler.max_rows))
    return Memory(
        total=target.device.memory_bytes or None,
        weights=layout.device_weight_bytes,
        adapters=_lora_pool_bytes(layout, engine.step.lora_pool),
        kv_pool=engine.pool_bytes,
        state=state + _STEPS_IN_FLIGHT * logits,
        temporaries=max((program.temporary_bytes for program in programs), default=0),
        programs=sum(program.code_bytes for program in programs),
    )


def _device_bytes(array: jax.ShapeDtypeStruct) -> int:
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _advice(layout: ModelLayout, engine: EngineLayout, target: Target, outcome: Outcome, memory: Memory) -> list[str]:
    advice: list[str] = []
    if outcome.error is not None:
        advice.append(f"the compiler: {outcome.error}")
    if outcome.error is not None or not memory.fits:
        advice.append("a lower --mem-fraction-static leaves more room for temporaries")
    if engine.scheduler.context_length < layout.scheduler.context_length:
        advice.append(
            f"the pool holds no request of {layout.scheduler.context_length:,} tokens, only of "
            f"{engine.scheduler.context_length:,}: --context-length, --kv-cache-dtype int8 or more devices help"
        )
    return advice


def _more_devices(layout: ModelLayout, target: Target) -> str:
    """Return advice on how many devices of this kind would hold the weights and the rest of a step."""
    now, total = model_size(layout.mesh), target.device.memory_bytes
    held = (
        f"weights are {layout.device_weight_bytes / 2**30:.1f} GiB on each of {now} devices of {total / 2**30:.1f} GiB"
    )
    if layout.decoder.args.parallelism.shared_experts:
        return f"{held}: try more of them, a lower --dp-size, or smaller weights"
    least = math.ceil(layout.device_weight_bytes * now / (_WEIGHTS_AT_MOST * total))
    for tp_size in range(max(now + 1, least), layout.config.num_q_heads + 1):
        # Try the current split of experts first, then whole experts on each device.
        for ep_size in dict.fromkeys((layout.mesh.shape[EXPERT], *_whole_experts(layout, tp_size))):
            if tp_size % ep_size == 0 and _fits(layout, tp_size, ep_size):
                flags = f"--tp-size {tp_size}" + (f" --ep-size {ep_size}" if ep_size > 1 else "")
                return f"{held}: try {flags} or smaller weights"
    return f"{held}: no number of them that divides the model is enough, only smaller weights"


def _whole_experts(layout: ModelLayout, tp_size: int) -> tuple[int, ...]:
    experts = layout.config.moe
    return () if experts is None else (math.gcd(tp_size, experts.num_experts),)


def _fits(layout: ModelLayout, tp_size: int, ep_size: int) -> bool:
    try:
        check_fit(layout, tp_size, ep_size)
    except LaunchError:
        return False
    return True
