"""Times whole decode steps of a model with random weights, and splits them by a profile."""

import functools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.device_check.events import StepSpeed
from jaxserve.layout.layout import EngineLayout
from jaxserve.models.param_spec import Weights
from jaxserve.plan.decode_load import DecodeLoad, needed_bytes
from jaxserve.plan.targets import DeviceSpec
from jaxserve.runner.programs import StepPrograms
from jaxserve.runner.runner import ModelRunner
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import NewRow, ScheduledRow, SchedulerOutput
from kernels_pallas.shards import DATA

_CONTEXT = 2048
_STEPS, _PROFILED_STEPS = 20, 5
# Standard deviation of random weights.
_SCALE = 0.02
# Names, or their beginnings, under which the project's kernels appear in profiles.
KERNEL_NAMES = (
    "paged_decode", "paged_prefill", "merge_decode", "kv_update", "grouped_matmul", "head_matmul", "narrow_matmul",
    "route", "rope", "rms_norm", "sample_", "lora_",
)  # fmt: skip


class Parts(NamedTuple):
    """Seconds of one device in the project's kernels, in XLA's, and idle between the first and the last."""

    kernels: float
    xla: float
    idle: float


class Activity(NamedTuple):
    """Something that a device did, in nanoseconds."""

    name: str
    start: float
    end: float


def time_steps(engine: EngineLayout, model: str, device: DeviceSpec | None) -> Iterator[StepSpeed]:
    """Yield the speed of decode steps in every bucket; all replicas have the same load."""
    runner = ModelRunner(engine.step, random_weights(engine))
    runner.compile(lambda names: names)
    runner.warm_up()
    for num_rows in sorted({bucket.num_rows for bucket in engine.step.buckets if bucket.single_tokens}):
        tokens = engine.cache.num_pages * engine.cache.page_size
        context = min(_CONTEXT, engine.scheduler.context_length, tokens // num_rows)
        if context < 1:
            continue
        plans = tuple(_plan(engine, num_rows, context, first=first) for first in (True, False))
        replicas = engine.step.mesh.shape[DATA]
        _run(runner, plans[0], replicas, 1)
        started = time.perf_counter()
        _run(runner, plans[1], replicas, _STEPS)
        seconds = (time.perf_counter() - started) / _STEPS
        parts = _profile(functools.partial(_run, runner, plans[1], replicas, _PROFILED_STEPS))
        least = needed_bytes(engine, DecodeLoad(num_rows, context, num_rows)) / device.bytes_per_s if device else None
        yield StepSpeed(
            model=model,
            rows=num_rows,
            context=context,
            seconds=seconds,
            share=None if least is None else least / seconds,
            kernel_seconds=None if parts is None else parts.kernels / _PROFILED_STEPS,
            xla_seconds=None if parts is None else parts.xla / _PROFILED_STEPS,
            idle_seconds=None if parts is None else parts.idle / _PROFILED_STEPS,
        )


def random_weights(engine: EngineLayout) -> Weights:
    """Make weights of the right shapes on the devices; random, so that tokens are routed to different experts."""
    keys = iter(jax.random.split(jax.random.key(0), len(engine.step.decoder.param_specs)))

    def make(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.jit(functools.partial(_random, shape.shape, shape.dtype), out_shardings=shape.sharding)(next(keys))

    return jax.tree.map(make, StepPrograms(engine.step).weight_shapes())


def _random(shape: tuple[int, ...], dtype: Any, key: jax.Array) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        # Small elements, and exponents of scales near 2**-7.
        return jax.random.randint(key, shape, 112, 120, jnp.int32).astype(dtype)
    return (_SCALE * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)


def _plan(engine: EngineLayout, num_rows: int, context: int, *, first: bool) -> SchedulerOutput:
    """Return a decode step; the first one admits the rows, and those after it repeat it."""
    size = engine.cache.page_size
    pages = -(-context // size)
    sampling = SamplingParams(temperature=0)
    return SchedulerOutput(
        step=0,
        new_rows=tuple(NewRow(row=row, sampling=sampling, seed=row) for row in range(num_rows)) if first else (),
        rows=tuple(
            ScheduledRow(
                row=row,
                token_ids=(row,),
                num_computed_tokens=context - 1,
                new_page_ids=tuple((row * pages + page) % engine.cache.num_pages for page in range(pages))
                if first
                else (),
                samples=True,
            )
            for row in range(num_rows)
        ),
    )


def _run(runner: ModelRunner, plan: SchedulerOutput, replicas: int, steps: int) -> None:
    """Send steps without waiting in between, then wait for the last."""
    plans = (plan,) * replicas
    pending = [runner.forward(plans).sample((None,) * replicas) for _ in range(steps)]
    pending[-1].result()


def _profile(run: Any) -> Parts | None:
    """Return where one device's time went, or None if the profile has no device."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = list(Path(folder).rglob("*.xplane.pb"))
        data = [jax.profiler.ProfileData.from_file(str(path)) for path in files]
    activities = [
        Activity(event.name, event.start_ns, event.end_ns)
        for each in data
        for plane in each.planes
        if plane.name.startswith(("/device:GPU:0", "/device:TPU:0"))
        for line in plane.lines
        if line.name.startswith("Stream") or line.name == "XLA Ops"
        for event in line.events
    ]
    return split_activities(activities) if activities else None


def split_activities(activities: Sequence[Activity]) -> Parts:
    """Split the time from the first activity to the last; what runs at the same time is counted once."""
    ordered = sorted(activities, key=lambda each: each.start)
    kernels = [each for each in ordered if each.name.startswith(KERNEL_NAMES)]
    busy, in_kernels = _covered(ordered), _covered(kernels)
    span = max(each.end for each in ordered) - ordered[0].start
    return Parts(in_kernels * 1e-9, (busy - in_kernels) * 1e-9, (span - busy) * 1e-9)


def _covered(ordered: Sequence[Activity]) -> float:
    """Return the nanoseconds during which there is an activity, of activities in order of their starts."""
    total, end = 0.0, float("-inf")
    for each in ordered:
        total += max(0.0, each.end - max(each.start, end))
        end = max(end, each.end)
    return total
