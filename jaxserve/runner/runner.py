"""Runs steps on the devices. This package is the only one that jits them.

The runner owns weights, cache and device state. It runs what a `SchedulerOutput` specifies, makes no decisions of its
own, and waits for the device only in `PendingStep.result`.

See `runner.programs` for the programs of a step.
"""

from collections.abc import Sequence
from typing import Any

import jax
import msgspec
import numpy as np

from jaxserve.models.param_spec import Weights, tree_of
from jaxserve.runner.batch import BatchLayout, ForwardBatch, RowTable, SampleBatch, SampleMasks
from jaxserve.runner.buckets import Bucket, ForwardShape, SampleShape
from jaxserve.runner.compiled import ProgramCache, Progress
from jaxserve.runner.programs import NOTHING, StepModel, StepPrograms
from jaxserve.runner.state import needs_row_state, row_state
from jaxserve.runner.transfer import put, to_devices, zeros
from jaxserve.runner_protocol import LoadedAdapter
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import (
    AdapterLoad,
    ConstrainedRows,
    NewRow,
    Plans,
    PromptLogprobs,
    ScheduledRow,
    SchedulerOutput,
    StepOutput,
)
from kernels_pallas.sampling.api import SampleOutput, SamplingMode, mask_words


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
        """Wait for the step and return one output per plan; raises what the step raised."""
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
    """Return the output of one plan; `top_ids_BJ` and `top_logprobs_BJ` are None unless a row needs them."""
    last = _last_logits_rows(plan)
    sampled = StepOutput(token_ids_B=token_B[last], finite_B=finite_B[last], logprobs_B=logprob_B[last])
    if top_ids_BJ is None or top_logprobs_BJ is None:
        return sampled
    prompt = {
        index: PromptLogprobs(logprob_B[rows], top_ids_BJ[rows], top_logprobs_BJ[rows])
        for index, row in enumerate(plan.rows)
        if row.prompt_targets
        for start in [last[index] + 1 - row.num_logits_rows]
        for rows in [slice(start, start + len(row.prompt_targets))]
    }
    return msgspec.structs.replace(
        sampled, top_ids_BJ=top_ids_BJ[last], top_logprobs_BJ=top_logprobs_BJ[last], prompt=prompt
    )


def _first_rows(bucket: Bucket, layout: BatchLayout) -> SchedulerOutput:
    """Return a step of a row that runs one token and, if the bucket is for prompts, of a row that runs two."""
    lengths = (1,) if bucket.single_tokens else (1, 2) if min(layout.max_rows, layout.num_pages) > 1 else (2,)
    sampling = SamplingParams(temperature=0)
    return SchedulerOutput(
        step=-1,
        new_rows=tuple(NewRow(row=row, sampling=sampling, seed=0) for row in range(len(lengths))),
        rows=tuple(
            ScheduledRow(row=row, token_ids=(0,) * length, num_computed_tokens=0, new_page_ids=(row,), samples=False)
            for row, length in enumerate(lengths)
        ),
    )


def _last_logits_rows(plan: SchedulerOutput) -> np.ndarray:
    """Return the index of each row's last row of logits in the step."""
    return np.cumsum([row.num_logits_rows for row in plan.rows]) - 1


def _prompt_lengths(plan: SchedulerOutput) -> list[tuple[int, int]]:
    """Return (tokens to run, tokens of the sequence after the step) of each row that runs several tokens."""
    rows = (row for row in plan.rows if row.num_tokens > 1)
    return [(row.num_tokens, row.num_computed_tokens + row.num_tokens) for row in rows]


class ForwardedStep:
    """A step whose forward pass was sent; its tokens are not sampled yet."""

    def __init__(
        self, runner: "ModelRunner", plans: Plans, batch: SampleBatch, mode: SamplingMode, logits: jax.Array
    ) -> None:
        self._runner = runner
        self._plans = plans
        self._batch = batch
        self._mode = mode
        self._logits = logits

    def sample(self, constrained: Sequence[ConstrainedRows | None]) -> PendingStep:
        """Send the sampling program.

        Args:
            constrained: the constrained rows of each plan, with their masks.
        """
        return self._runner.sample(self._plans, self._batch, self._mode, self._logits, constrained)


class ModelRunner:
    """One model on one mesh.

    Args:
        model: the model, its backends and its memory layout.
        weights: its parameters, on the mesh.
    """

    def __init__(self, model: StepModel, weights: Weights) -> None:
        self._model = model
        self._weights = weights
        self._lowering = StepPrograms(model)
        self._num_replicas = self._lowering.num_replicas
        self._by_replica = self._lowering.by_replica
        self._rows = [RowTable(model.layout) for _ in range(self._num_replicas)]
        self._cache = zeros(self._lowering.cache_shapes())
        self._state = self._lowering.empty_state()
        self._adapters: dict[str, LoadedAdapter] = {}
        self._lora_pool = zeros(self._lowering.lora_pool_shapes())  # zero matrices change nothing
        self._slot_shardings = jax.tree.map(lambda leaf: leaf.sharding, self._lowering.slot_shapes())
        self._shapes = model.shapes
        self._programs = ProgramCache(
            self._shapes, model.sample_shapes, self._lowering.lower_forward, self._lowering.lower_sample
        )
        self._write_row: Any = None
        self._write_slot: Any = None
        self._no_masks: dict[int, SampleMasks] = {}

    @property
    def num_programs(self) -> int:
        """Number of programs for forward passes and sampling."""
        return self._programs.num_programs

    def compile(self, progress: Progress) -> None:
        """Compile every program."""
        self._programs.compile_all(progress)
        self._write_row = self._lowering.lower_write_row().compile()
        if self._model.lora_pool is not None:
            self._write_slot = self._lowering.lower_write_slot().compile()

    def warm_up(self) -> None:
        """Run every program once, through the same code path as a real step.

        Forward passes run a row or two, whose keys and values go to pages that no request has yet: on padding alone,
        attention and cache writes would do nothing, and a kernel that fails would fail under the first request.
        """
        nothing = (None,) * self._num_replicas
        self._no_masks = {
            bucket.num_rows: to_devices(self._masks(nothing, nothing, bucket.num_rows), self._by_replica)
            for bucket in self._model.buckets
        }
        for shape in self._shapes:
            plan = _first_rows(shape.bucket, self._model.layout)
            for rows in self._rows:
                for new in plan.new_rows:
                    rows.admit(new)
            self._run_forward(shape, (plan,) * self._num_replicas).sample(nothing)
        for shape in self._model.sample_shapes:
            num_rows = shape.num_rows
            batch, _ = self._batch(Bucket(num_rows, num_rows), nothing)
            logits = zeros(self._lowering.logits_shape(num_rows))
            masks = self._no_masks[num_rows]
            self._run_sample(shape, nothing, to_devices(batch.sample, self._by_replica), masks, logits)
        jax.block_until_ready(self._state)

    def add_adapter(self, key: str, adapter: LoadedAdapter) -> None:
        """See `RunnerAdapters`."""
        self._adapters[key] = adapter

    def remove_adapter(self, key: str) -> None:
        """See `RunnerAdapters`."""
        del self._adapters[key]

    def forward(self, plans: Plans) -> ForwardedStep:
        """Send the forward pass of a step of all replicas to the devices and return immediately."""
        for replica, plan in enumerate(plans):
            for load in plan.adapter_loads if plan is not None else ():
                self._load(load)
            for new in plan.new_rows if plan is not None else ():
                self._admit(replica, new)
        running = [plan for plan in plans if plan is not None]
        bucket = self._programs.pick(
            max(plan.num_tokens for plan in running),
            # Every row has at least one row of logits.
            max(plan.num_logits_rows for plan in running),
            single_tokens=all(row.num_tokens == 1 for plan in running for row in plan.rows),
        )
        adapted = self._model.lora_pool is not None and any(
            rows.uses_adapters(plan) for rows, plan in zip(self._rows, plans, strict=True) if plan is not None
        )
        shape = ForwardShape(bucket, adapted, mha_prefill=not adapted and self._takes_mha_prefill(bucket, running))
        return self._run_forward(shape, plans)

    def _takes_mha_prefill(self, bucket: Bucket, plans: Sequence[SchedulerOutput]) -> bool:
        """Return whether the MHA form of the prompts is cheaper; a step takes as long as its slowest replica."""
        workspace = self._model.mla_workspace
        if workspace is None or ForwardShape(bucket, mha_prefill=True) not in self._shapes:
            return False
        costs = [workspace.costs(_prompt_lengths(plan)) for plan in plans]
        return max(cost.mha for cost in costs) < max(cost.absorbed for cost in costs)

    def sample(
        self,
        plans: Plans,
        batch: SampleBatch,
        mode: SamplingMode,
        logits: jax.Array,
        constrained: Sequence[ConstrainedRows | None],
    ) -> PendingStep:
        """Sample the tokens of a forwarded step; see `ForwardedStep.sample`."""
        num_rows = logits.shape[0] // self._num_replicas
        if any(rows is not None for rows in constrained):
            masks, mode = self._masks(plans, constrained, num_rows), SamplingMode.ADJUSTED
            masks = to_devices(masks, self._by_replica)
        else:
            masks = self._no_masks[num_rows]
        return self._run_sample(SampleShape(num_rows, mode), plans, batch, masks, logits)

    def _run_sample(
        self, shape: SampleShape, plans: Plans, batch: SampleBatch, masks: SampleMasks, logits: jax.Array
    ) -> PendingStep:
        self._state, out = self._programs.sample(shape)(logits, self._state, batch, masks)
        return PendingStep(plans, out)

    def reset(self) -> None:
        """Recreate cache and state after a step raised, since donation has deleted the old ones.

        Runs an empty step to check that the devices still work; raises what that step raises.
        """
        # If the step failed before donation, the old arrays are alive. Free them first: memory does not hold both.
        self._cache = {}
        del self._state
        self._lora_pool = {}
        self._lora_pool = zeros(self._lowering.lora_pool_shapes())
        self._cache = zeros(self._lowering.cache_shapes())
        self._state = self._lowering.empty_state()
        self._run_empty(ForwardShape(self._model.buckets[-1])).result()

    def _admit(self, replica: int, new: NewRow) -> None:
        """Assign a row of a replica to a new sequence."""
        self._rows[replica].admit(new)
        if needs_row_state(new):
            row = replica * (self._model.layout.max_rows + 1) + new.row
            self._state = self._write_row(self._state, np.int32(row), row_state(new, self._model.layout.vocab_size))

    def _load(self, load: AdapterLoad) -> None:
        """Write an adapter into a slot; steps in flight come before the write in the devices' queues."""
        leaves = self._adapters[load.key].leaves
        contents = jax.tree.map(put, tree_of(leaves.items()), self._slot_shardings)
        self._lora_pool = self._write_slot(self._lora_pool, np.int32(load.slot), contents)

    def _run_forward(self, shape: ForwardShape, plans: Plans) -> ForwardedStep:
        on_host, mode = self._batch(shape.bucket, plans)
        batch = to_devices(on_host, self._by_replica)
        forward = self._programs.forward(shape)
        lora_pool = self._lora_pool if shape.adapted else {}
        self._cache, logits = forward(self._weights, lora_pool, self._cache, self._state.last_token_R, batch)
        return ForwardedStep(self, plans, batch.sample, mode, logits)

    def _run_empty(self, shape: ForwardShape) -> PendingStep:
        nothing = (None,) * self._num_replicas
        return self._run_forward(shape, nothing).sample(nothing)

    def _batch(self, bucket: Bucket, plans: Plans) -> tuple[ForwardBatch, SamplingMode]:
        """Build the batches of all replicas, stacked, and return them with the sampling mode that suffices for all."""
        batches = [rows.build(plan or NOTHING, bucket) for rows, plan in zip(self._rows, plans, strict=True)]
        needed = max(batch.sample.mode(self._model.layout.vocab_size) for batch in batches)
        mode = min(mode for mode in self._model.sample_modes if mode >= needed)
        return jax.tree.map(lambda *arrays: np.stack(arrays), *batches), mode

    def _masks(self, plans: Plans, constrained: Sequence[ConstrainedRows | None], num_rows: int) -> SampleMasks:
        """Stack the replicas' masks; the mask of a constrained row applies to its last row of logits."""
        words = mask_words(self._model.layout.vocab_size)
        masks = SampleMasks(
            np.zeros((self._num_replicas, num_rows), bool), np.zeros((self._num_replicas, num_rows, words), np.int32)
        )
        for replica, (plan, rows) in enumerate(zip(plans, constrained, strict=True)):
            if plan is not None and rows is not None:
                last = _last_logits_rows(plan)[list(rows.rows)]
                masks.masked_B[replica, last] = True
                masks.mask_BW[replica, last] = rows.bits_CW
        return masks
