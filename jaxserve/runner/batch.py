"""From a `SchedulerOutput` to the arrays of one step.

`RowTable` keeps each running request's sampling parameters on the host, in numpy, row by row; building a batch
gathers from it. Everything a step reads arrives in six arrays, because every transfer has a fixed price.
"""

from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxserve.runner.buckets import Bucket
from jaxserve.step import NewRow, SchedulerOutput
from kernels_pallas.paged_attention.api import AttentionMeta
from kernels_pallas.sampling.api import SamplingInputs

# numpy on the host, jax inside the step.
Array: TypeAlias = Any


class SampleMasks(NamedTuple):
    """What the draws of a step may be; see `SamplingInputs`.

    Attributes:
        masked_B: bool.
        mask_BW: i32.
    """

    masked_B: Array
    mask_BW: Array


class SampleBatch(NamedTuple):
    """How a step draws.

    Attributes:
        ints_8B: i32: token index, state row, written row, target, position, top-k, flags, adapter slot.
        floats_6B: f32: temperature, top-p, min-p, frequency, presence, repetition.
        seeds_B2: u32.
    """

    ints_8B: Array
    floats_6B: Array
    seeds_B2: Array

    def sampling_inputs(self, masks: SampleMasks) -> SamplingInputs:
        """The sampler's view."""
        _, row, _, target, position, top_k, flags, _ = self.ints_8B
        temperature, top_p, min_p, frequency, presence, repetition = self.floats_6B
        return SamplingInputs(
            row_B=row,
            target_B=target,
            position_B=position,
            seed_B2=self.seeds_B2,
            temperature_B=temperature,
            top_k_B=top_k,
            top_p_B=top_p,
            min_p_B=min_p,
            frequency_B=frequency,
            presence_B=presence,
            repetition_B=repetition,
            biased_B=(flags & _BIASED) != 0,
            forbid_stops_B=(flags & _FORBID_STOPS) != 0,
            logprobs_B=(flags & _LOGPROBS) != 0,
            masked_B=masks.masked_B,
            mask_BW=masks.mask_BW,
        )


class ForwardBatch(NamedTuple):
    """One step's input, padded to its bucket. T tokens, B rows (and as many draws), M pages per row.

    Attributes:
        tokens_4T: i32: token id, or `-1 - row` for the token that the step before drew for a row; position; slot in
            the cache; adapter slot.
        rows_4B: i32: kv length; end of the row's tokens; the two counts of `distribution` at [2:4, 0].
        page_table_BM: i32.
        draws: how it draws.
    """

    tokens_4T: Array
    rows_4B: Array
    page_table_BM: Array
    draws: SampleBatch

    def attention_meta(self) -> AttentionMeta:
        """The attention backend's view."""
        return AttentionMeta(
            kv_lens_B=self.rows_4B[0],
            page_table_BM=self.page_table_BM,
            cu_q_lens_B1=jnp.concatenate([jnp.zeros(1, jnp.int32), self.rows_4B[1]]),
            distribution_2=self.rows_4B[2:4, 0],
            slot_mapping_T=self.tokens_4T[2],
            positions_T=self.tokens_4T[1],
        )


_BIASED, _FORBID_STOPS, _LOGPROBS = 1, 2, 4


class BatchLayout(NamedTuple):
    """Numbers that a batch's padding is made of.

    Attributes:
        max_rows: rows of per-request state; index `max_rows` is the spare, neutral one.
        page_size, num_pages: of the pool; slots past it are dropped.
        pages_per_row: M.
        vocab_size: top-k of a draw without top-k.
    """

    max_rows: int
    page_size: int
    num_pages: int
    pages_per_row: int
    vocab_size: int


class RowTable:
    """Sampling parameters of the running requests, by row, and the batches made from them."""

    def __init__(self, layout: BatchLayout) -> None:
        self._layout = layout
        num_rows = layout.max_rows + 1
        self._floats_6R = np.zeros((6, num_rows), np.float32)
        self._seeds_R2 = np.zeros((num_rows, 2), np.uint32)
        self._top_k_R = np.zeros(num_rows, np.int32)
        self._min_tokens_R = np.zeros(num_rows, np.int32)
        self._flags_R = np.zeros(num_rows, np.int32)
        self._adapter_slot_R = np.zeros(num_rows, np.int32)
        self._pages_RM = np.zeros((num_rows, layout.pages_per_row), np.int32)
        self._num_pages_R = np.zeros(num_rows, np.int32)
        # The spare row is neutral.
        self._floats_6R[:, layout.max_rows] = 0.0, 1.0, 0.0, 0.0, 0.0, 1.0
        self._top_k_R[layout.max_rows] = layout.vocab_size

    def admit(self, new: NewRow) -> None:
        """Take over a row for a new owner."""
        sampling = new.sampling
        self._num_pages_R[new.row] = 0
        self._floats_6R[:, new.row] = (
            0.0 if sampling.greedy else sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.frequency_penalty,
            sampling.presence_penalty,
            sampling.repetition_penalty,
        )
        seed = new.seed % 2**64
        self._seeds_R2[new.row] = seed & 0xFFFFFFFF, seed >> 32
        self._top_k_R[new.row] = sampling.top_k if sampling.top_k > 0 else self._layout.vocab_size
        self._min_tokens_R[new.row] = sampling.min_tokens
        self._adapter_slot_R[new.row] = new.adapter_slot
        self._flags_R[new.row] = (_BIASED if sampling.logit_bias else 0) | (
            _LOGPROBS if sampling.num_logprobs is not None else 0
        )

    def uses_adapters(self, plan: SchedulerOutput) -> bool:
        """Whether a row of the plan has one."""
        return any(self._adapter_slot_R[row.row] for row in plan.rows)

    def build(self, plan: SchedulerOutput, bucket: Bucket) -> ForwardBatch:
        """Pad a plan to a bucket."""
        layout = self._layout
        count = len(plan.rows)
        row_b = np.fromiter((row.row for row in plan.rows), np.int32, count)
        length_b = np.fromiter((row.num_tokens for row in plan.rows), np.int32, count)
        start_b = np.fromiter((row.num_computed_tokens for row in plan.rows), np.int32, count)
        end_b = np.cumsum(length_b)
        total = int(end_b[-1]) if count else 0
        self._add_pages(plan)

        tokens_4T = np.zeros((4, bucket.num_tokens), np.int32)
        ids_t, position_t, slot_t, adapter_slot_t = tokens_4T[:, :total]
        ids_t[:] = np.fromiter(chain.from_iterable(row.token_ids for row in plan.rows), np.int32, total)
        last_b = ids_t[end_b - 1]
        ids_t[end_b - 1] = np.where(last_b < 0, -1 - row_b, last_b)
        position_t[:] = np.arange(total) + np.repeat(start_b - end_b + length_b, length_b)
        page_t = self._pages_RM[np.repeat(row_b, length_b), position_t // layout.page_size]
        slot_t[:] = page_t * layout.page_size + position_t % layout.page_size
        tokens_4T[2, total:] = layout.num_pages * layout.page_size
        adapter_slot_t[:] = np.repeat(self._adapter_slot_R[row_b], length_b)

        rows_4B = np.zeros((4, bucket.num_rows), np.int32)
        rows_4B[0, :count] = start_b + length_b
        rows_4B[1, :count] = end_b
        rows_4B[1, count:] = total
        rows_4B[2:, 0] = np.count_nonzero(length_b == 1), count
        page_table_BM = np.zeros((bucket.num_rows, layout.pages_per_row), np.int32)
        page_table_BM[:count] = self._pages_RM[row_b]

        return ForwardBatch(tokens_4T, rows_4B, page_table_BM, self.draws(plan, end_b - length_b, bucket.num_rows))

    def _add_pages(self, plan: SchedulerOutput) -> None:
        for row in plan.rows:
            if row.new_page_ids:
                first = self._num_pages_R[row.row]
                end = first + len(row.new_page_ids)
                self._pages_RM[row.row, first:end] = row.new_page_ids
                self._num_pages_R[row.row] = end

    def draws(self, plan: SchedulerOutput, first_token_b: np.ndarray, num_rows: int) -> SampleBatch:
        """One draw after each row's last token; for prompt log-probabilities one after every token.

        Args:
            plan: the step.
            first_token_b: index of each row's first token.
            num_rows: of the bucket.
        """
        spare = self._layout.max_rows
        ints_8B = np.zeros((8, num_rows), np.int32)
        ints_8B[1] = spare
        ints_8B[2] = spare + 1  # past the state: the write is dropped
        ints_8B[3] = -1
        draw = 0
        for row, first in zip(plan.rows, first_token_b.tolist(), strict=True):
            if row.prompt_targets:
                count = len(row.prompt_targets)
                ints_8B[0, draw : draw + count] = np.arange(first, first + count)
                ints_8B[3, draw : draw + count] = row.prompt_targets
                ints_8B[6, draw : draw + count] = _LOGPROBS
                draw += count
            if len(row.prompt_targets) < row.num_tokens:
                end = row.num_computed_tokens + row.num_tokens
                forbid = _FORBID_STOPS if row.num_output_tokens < self._min_tokens_R[row.row] else 0
                written = row.row if row.samples else spare + 1
                ints_8B[:7, draw] = first + row.num_tokens - 1, row.row, written, -1, end, 0, forbid
                draw += 1
        ints_8B[5] = self._top_k_R[ints_8B[1]]
        ints_8B[6] |= self._flags_R[ints_8B[1]]
        ints_8B[7] = self._adapter_slot_R[ints_8B[1]]
        return SampleBatch(ints_8B, self._floats_6R[:, ints_8B[1]], self._seeds_R2[ints_8B[1]])
