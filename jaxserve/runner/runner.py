"""Runs steps on the devices: the only package that calls `jit`.

The runner owns weights, cache and device state. It is told what to run (`SchedulerOutput`), never decides it, and
never waits for the device inside `dispatch`: the answer is fetched by `PendingStep.result`.

Copies of the model (`--dp-size`) take their steps in one program, split over the mesh axis `data`: cache, state and
batch of the copies lie side by side along the leading axis, and no copy reads another's.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.models.decoder import Decoder, Weights
from jaxserve.request import SamplingParams
from jaxserve.runner.batch import BatchLayout, ForwardBatch, RowTable
from jaxserve.runner.buckets import Bucket
from jaxserve.runner.compiled import CompiledSteps, Progress
from jaxserve.runner.state import DeviceState, empty_state, needs_row_state, row_state, write_row
from jaxserve.step import NewRow, Plans, PromptLogprobs, SchedulerOutput, StepOutput
from kernels_pallas.paged_attention.api import AttentionBackend, Cache
from kernels_pallas.sampling.api import SampleOutput, SamplingInputs
from kernels_pallas.sampling.xla import sample

_NOTHING = SchedulerOutput(step=-1, new_rows=(), rows=())


class RunnerParts(NamedTuple):
    """What a runner is made of.

    Attributes:
        decoder: the model.
        weights: its parameters, on the mesh.
        attention: the attention backend, which shapes the cache.
        mesh: where all of it lives, (data, model).
        layout: sizes of rows, pages and vocabulary.
        buckets: shapes to compile, widest first.
    """

    decoder: Decoder
    weights: Weights
    attention: AttentionBackend
    mesh: Mesh
    layout: BatchLayout
    buckets: tuple[Bucket, ...]


class PendingStep:
    """A step that was sent to the devices."""

    def __init__(self, plans: Plans, out: SampleOutput) -> None:
        self._plans = plans
        self._wants_top = any(
            row.wants_logprobs or row.prompt_targets for plan in plans if plan is not None for row in plan.rows
        )
        self._out = out if self._wants_top else out[:3]
        for array in self._out:
            array.copy_to_host_async()

    def result(self) -> tuple[StepOutput | None, ...]:
        """Wait for the step; raises what the step raised. One output per plan."""
        arrays = [np.split(np.asarray(array), len(self._plans)) for array in self._out]
        return tuple(
            None if plan is None else _step_output(plan, *(parts[index] for parts in arrays))
            for index, plan in enumerate(self._plans)
        )


def _step_output(
    plan: SchedulerOutput,
    token_B: np.ndarray,
    finite_B: np.ndarray,
    logprob_B: np.ndarray,
    top_ids_BJ: np.ndarray | None = None,
    top_logprobs_BJ: np.ndarray | None = None,
) -> StepOutput:
    """The draws of one plan; the arrays of the likeliest tokens are there when a row wants them."""
    counts = np.array([row.num_draws for row in plan.rows])
    ends = np.cumsum(counts)
    last = ends - 1
    drawn = StepOutput(token_ids_B=token_B[last], finite_B=finite_B[last], logprobs_B=logprob_B[last])
    if top_ids_BJ is None or top_logprobs_BJ is None:
        return drawn
    prompt = {
        index: PromptLogprobs(logprob_B[draws], top_ids_BJ[draws], top_logprobs_BJ[draws])
        for index, row in enumerate(plan.rows)
        if row.prompt_targets
        for draws in [slice(ends[index] - counts[index], ends[index] - counts[index] + len(row.prompt_targets))]
    }
    return msgspec.structs.replace(
        drawn, top_ids_BJ=top_ids_BJ[last], top_logprobs_BJ=top_logprobs_BJ[last], prompt=prompt
    )


class ModelRunner:
    """One model on one mesh."""

    def __init__(self, parts: RunnerParts) -> None:
        self._parts = parts
        self._copies: int = parts.mesh.shape["data"]
        self._by_copy = NamedSharding(parts.mesh, P("data"))
        self._rows = [RowTable(parts.layout) for _ in range(self._copies)]
        self._cache = self._empty_cache()
        self._state = self._empty_state()
        # Split by hand over `data`; over `model` the compiler splits what is in the step.
        step = jax.shard_map(
            partial(_step, parts.decoder, parts.attention),
            mesh=parts.mesh,
            axis_names={"data"},
            in_specs=(P(), P("data"), P("data"), P("data")),
            out_specs=P("data"),
            check_vma=False,
        )
        self._step = jax.jit(
            step, donate_argnums=(1, 2), out_shardings=(self._cache_shardings(), self._by_copy, self._by_copy)
        )
        self._programs = CompiledSteps(parts.buckets, self._lower)
        self._write_row: Any = None

    @property
    def num_programs(self) -> int:
        """Programs a step is compiled to."""
        return len(self._parts.buckets)

    def warm_up(self, progress: Progress) -> None:
        """Compile every program, and run each once on padding: the real path with nothing in it."""
        self._programs.compile_all(progress)
        spare = jnp.int32(self._parts.layout.max_rows)
        neutral = row_state(NewRow(row=0, sampling=SamplingParams(), seed=0), self._parts.layout.vocab_size)
        write = jax.jit(write_row, donate_argnums=0, out_shardings=self._by_copy)
        self._write_row = write.lower(self._state, spare, neutral).compile()
        for bucket in self._parts.buckets:
            self._run(bucket, (None,) * self._copies)
        jax.block_until_ready(self._state)

    def dispatch(self, plans: Plans) -> PendingStep:
        """Send a step of every copy to the devices and return at once."""
        for copy, plan in enumerate(plans):
            for new in plan.new_rows if plan is not None else ():
                self._admit(copy, new)
        running = [plan for plan in plans if plan is not None]
        bucket = self._programs.pick(
            max(plan.num_tokens for plan in running),
            # Every row has a draw, and some have more.
            max(plan.num_draws for plan in running),
            single_tokens=all(row.num_tokens == 1 for plan in running for row in plan.rows),
        )
        return PendingStep(plans, self._run(bucket, plans))

    def reset(self) -> None:
        """Make the cache and state anew, after a step that raised has left the donated ones deleted.

        Runs an empty step, to see whether the devices still can; raises what that raises.
        """
        # The old ones may be alive, if the failure came before they were donated; two do not fit.
        self._cache, self._state = {}, None  # type: ignore[assignment]
        self._cache = self._empty_cache()
        self._state = self._empty_state()
        jax.block_until_ready(self._run(self._parts.buckets[-1], (None,) * self._copies))

    def _admit(self, copy: int, new: NewRow) -> None:
        """A row of a copy has a new owner."""
        self._rows[copy].admit(new)
        if needs_row_state(new):
            row = copy * (self._parts.layout.max_rows + 1) + new.row
            self._state = self._write_row(self._state, np.int32(row), row_state(new, self._parts.layout.vocab_size))

    def _run(self, bucket: Bucket, plans: Plans) -> SampleOutput:
        batch = jax.device_put(self._batch(bucket, plans), self._by_copy)
        self._cache, self._state, out = self._programs[bucket](self._parts.weights, self._cache, self._state, batch)
        return out

    def _batch(self, bucket: Bucket, plans: Plans) -> ForwardBatch:
        """The copies' batches, stacked."""
        batches = [rows.build(plan or _NOTHING, bucket) for rows, plan in zip(self._rows, plans, strict=True)]
        return ForwardBatch(*(np.stack(arrays) for arrays in zip(*batches, strict=True)))

    def _lower(self, bucket: Bucket) -> jax.stages.Lowered:
        abstract = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self._by_copy),
            self._batch(bucket, (None,) * self._copies),
        )
        return self._step.lower(self._parts.weights, self._cache, self._state, abstract)

    def _cache_shardings(self) -> dict[str, NamedSharding]:
        specs = self._parts.attention.cache_spec()
        return {name: NamedSharding(self._parts.mesh, P("data", *spec.partition[1:])) for name, spec in specs.items()}

    def _empty_cache(self) -> Cache:
        shardings = self._cache_shardings()
        return {
            name: jnp.zeros((self._copies * spec.shape[0], *spec.shape[1:]), spec.dtype, device=shardings[name])
            for name, spec in self._parts.attention.cache_spec().items()
        }

    def _empty_state(self) -> DeviceState:
        layout = self._parts.layout
        return empty_state(self._copies * (layout.max_rows + 1), layout.vocab_size, self._by_copy)


def _step(
    decoder: Decoder,
    attention: AttentionBackend,
    weights: Weights,
    cache: Cache,
    state: DeviceState,
    batch: ForwardBatch,
) -> tuple[Cache, DeviceState, SampleOutput]:
    """One copy's step: embed, layers, logits of the drawn tokens only, sampling, state update."""
    batch = jax.tree.map(lambda array: array[0], batch)
    token_ids_T, positions_T, _ = batch.tokens_3T
    pending_T = token_ids_T < 0
    last_T = state.last_token_R[jnp.where(pending_T, -1 - token_ids_T, 0)]
    token_ids_T = jnp.where(pending_T, last_T, token_ids_T)
    plan = attention.plan(batch.attention_meta())
    x_TD, cache = decoder.forward(weights, cache, token_ids_T, positions_T, plan, attention)
    logits_BV = decoder.logits(weights, x_TD[batch.draws_8B[0]])
    out: SampleOutput = decoder.tokenwise(
        lambda logits, *fields: sample(logits, SamplingInputs(*fields), state.sampling),
        logits_BV,
        *batch.sampling_inputs(),
    )
    return cache, state.record(batch.draws_8B[2], out), out
