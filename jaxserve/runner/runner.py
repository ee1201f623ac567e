"""Runs steps on the devices: the only package that calls `jit`.

The runner owns weights, cache and device state. It is told what to run (`SchedulerOutput`), never decides it, and
never waits for the device inside `dispatch`: the answer is fetched by `PendingStep.result`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.models.decoder import Decoder, Weights
from jaxserve.request import SamplingParams
from jaxserve.runner.batch import BatchLayout, ForwardBatch, RowTable
from jaxserve.runner.buckets import Bucket
from jaxserve.runner.compiled import CompiledSteps, Progress
from jaxserve.runner.state import DeviceState, empty_state, needs_row_state, row_state, write_row
from jaxserve.step import NewRow, PromptLogprobs, SchedulerOutput, StepOutput
from kernels_pallas.paged_attention.api import AttentionBackend, Cache
from kernels_pallas.sampling.api import SampleOutput, SamplingInputs
from kernels_pallas.sampling.xla import sample


class RunnerParts(NamedTuple):
    """What a runner is made of.

    Attributes:
        decoder: the model.
        weights: its parameters, on the mesh.
        attention: the attention backend, which shapes the cache.
        mesh: where all of it lives.
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

    def __init__(self, plan: SchedulerOutput, out: SampleOutput) -> None:
        self._plan = plan
        self._out = out
        self._wants_top = any(row.wants_logprobs or row.prompt_targets for row in plan.rows)
        for array in out if self._wants_top else out[:3]:
            array.copy_to_host_async()

    def result(self) -> StepOutput:
        """Wait for the step; raises what the step raised."""
        counts = np.array([row.num_draws for row in self._plan.rows])
        ends = np.cumsum(counts)
        token_B, finite_B, logprob_B = (np.asarray(array) for array in self._out[:3])
        last = ends - 1
        drawn = StepOutput(token_ids_B=token_B[last], finite_B=finite_B[last], logprobs_B=logprob_B[last])
        if not self._wants_top:
            return drawn
        top_ids_BJ, top_logprobs_BJ = (np.asarray(array) for array in self._out[3:])
        prompt = {
            index: PromptLogprobs(logprob_B[draws], top_ids_BJ[draws], top_logprobs_BJ[draws])
            for index, row in enumerate(self._plan.rows)
            if row.prompt_targets
            for draws in [slice(ends[index] - counts[index], ends[index] - counts[index] + len(row.prompt_targets))]
        }
        return StepOutput(
            token_ids_B=drawn.token_ids_B,
            finite_B=drawn.finite_B,
            logprobs_B=drawn.logprobs_B,
            top_ids_BJ=top_ids_BJ[last],
            top_logprobs_BJ=top_logprobs_BJ[last],
            prompt=prompt,
        )


class ModelRunner:
    """One model on one mesh."""

    def __init__(self, parts: RunnerParts) -> None:
        self._parts = parts
        self._replicated = NamedSharding(parts.mesh, PartitionSpec())
        self._rows = RowTable(parts.layout)
        self._cache = self._empty_cache()
        self._state = empty_state(parts.layout.max_rows, parts.layout.vocab_size, parts.mesh)
        self._step = jax.jit(
            partial(_step, parts.decoder, parts.attention),
            donate_argnums=(1, 2),
            out_shardings=(self._cache_shardings(), self._replicated, self._replicated),
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
        write = jax.jit(write_row, donate_argnums=0, out_shardings=self._replicated)
        self._write_row = write.lower(self._state, spare, neutral).compile()
        empty = SchedulerOutput(step=-1, new_rows=(), rows=())
        for bucket in self._parts.buckets:
            self._run(bucket, self._programs.pick(*bucket)[1], empty)
        jax.block_until_ready(self._state)

    def dispatch(self, plan: SchedulerOutput) -> PendingStep:
        """Send a step to the devices and return at once."""
        for new in plan.new_rows:
            self._rows.admit(new)
            if needs_row_state(new):
                contents = row_state(new, self._parts.layout.vocab_size)
                self._state = self._write_row(self._state, np.int32(new.row), contents)
        num_draws = sum(row.num_draws for row in plan.rows)
        bucket, program = self._programs.pick(plan.num_tokens, max(len(plan.rows), num_draws))
        return PendingStep(plan, self._run(bucket, program, plan))

    def reset(self) -> None:
        """Make the cache and state anew, after a step that raised has left the donated ones deleted."""
        # The old ones may be alive, if the failure came before they were donated; two do not fit.
        del self._cache, self._state
        self._cache = self._empty_cache()
        self._state = empty_state(self._parts.layout.max_rows, self._parts.layout.vocab_size, self._parts.mesh)

    def _run(self, bucket: Bucket, program: Any, plan: SchedulerOutput) -> SampleOutput:
        batch = self._rows.build(plan, bucket)
        batch = jax.device_put(batch, self._replicated)
        self._cache, self._state, out = program(self._parts.weights, self._cache, self._state, batch)
        return out

    def _lower(self, bucket: Bucket) -> jax.stages.Lowered:
        batch = RowTable(self._parts.layout).build(SchedulerOutput(step=-1, new_rows=(), rows=()), bucket)
        abstract = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self._replicated), batch
        )
        return self._step.lower(self._parts.weights, self._cache, self._state, abstract)

    def _cache_shardings(self) -> dict[str, NamedSharding]:
        specs = self._parts.attention.cache_spec()
        return {name: NamedSharding(self._parts.mesh, spec.partition) for name, spec in specs.items()}

    def _empty_cache(self) -> Cache:
        shardings = self._cache_shardings()
        return {
            name: jnp.zeros(spec.shape, spec.dtype, device=shardings[name])
            for name, spec in self._parts.attention.cache_spec().items()
        }


def _step(
    decoder: Decoder,
    attention: AttentionBackend,
    weights: Weights,
    cache: Cache,
    state: DeviceState,
    batch: ForwardBatch,
) -> tuple[Cache, DeviceState, SampleOutput]:
    """Embed, layers, logits of the drawn tokens only, sampling, state update. Donates cache and state."""
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
