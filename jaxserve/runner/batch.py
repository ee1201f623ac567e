"""Builds the arrays of one step from a `SchedulerOutput`.

`RowTable` keeps the sampling parameters of running requests on the host, in numpy, indexed by row; building a batch
gathers from it. Everything a step reads arrives in six arrays, because every transfer has a fixed cost.
"""

from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxserve.runner.buckets import Bucket
from jaxserve.runner.fields import RowField, SampleField, SampleFlag, TokenField
from jaxserve.sampling_params import DEVICE_FIELDS, SamplingParams
from jaxserve.step import NewRow, SchedulerOutput
from kernels_pallas.paged_attention.api import AttentionMeta
from kernels_pallas.sampling.api import SamplingInputs, SamplingMode
from kernels_pallas.sampling.common.summary import sampling_mode

# numpy on the host, jax inside the step.
Array: TypeAlias = Any


class SampleMasks(NamedTuple):
    """Grammar masks of the rows of logits; see `SamplingInputs`.

    Attributes:
        masked_B: bool, whether a row is masked.
        mask_BW: i32, the packed masks.
    """

    masked_B: Array
    mask_BW: Array


class SampleBatch(NamedTuple):
    """Sampling inputs for each row of logits.

    Attributes:
        ints_8B: i32, rows named by `SampleField`.
        floats_6B: f32, rows in the order of `DEVICE_FIELDS`.
        seeds_B2: u32, low and high half of the seed.
    """

    ints_8B: Array
    floats_6B: Array
    seeds_B2: Array

    def sampling_inputs(self, masks: SampleMasks) -> SamplingInputs:
        """Return the sampler's view of the batch."""
        ints, flags = self.ints_8B, self.ints_8B[SampleField.FLAGS]
        floats = {str(field.device): row for field, row in zip(DEVICE_FIELDS, self.floats_6B, strict=True)}
        return SamplingInputs(
            row_B=ints[SampleField.STATE_ROW],
            target_B=ints[SampleField.TARGET],
            position_B=ints[SampleField.POSITION],
            seed_B2=self.seeds_B2,
            top_k_B=ints[SampleField.TOP_K],
            biased_B=(flags & SampleFlag.BIASED) != 0,
            forbid_stops_B=(flags & SampleFlag.FORBID_STOPS) != 0,
            logprobs_B=(flags & SampleFlag.LOGPROBS) != 0,
            masked_B=masks.masked_B,
            mask_BW=masks.mask_BW,
            **floats,
        )

    def mode(self, vocab_size: int) -> SamplingMode:
        """Return the mode that suffices for all rows if none is masked, from arrays on the host."""
        return sampling_mode(self.sampling_inputs(SampleMasks(np.False_, np.int32(0))), vocab_size)


class ForwardBatch(NamedTuple):
    """One step's input, padded to its bucket. T tokens, B rows (and B rows of logits), M pages per row.

    Attributes:
        tokens_4T: i32, rows named by `TokenField`.
        rows_4B: i32, rows named by `RowField`.
        page_table_BM: i32, pages of each row.
        sample: sampling inputs.
    """

    tokens_4T: Array
    rows_4B: Array
    page_table_BM: Array
    sample: SampleBatch

    def attention_meta(self) -> AttentionMeta:
        """Return the attention backend's view of the batch."""
        return AttentionMeta(
            kv_lens_B=self.rows_4B[RowField.KV_LEN],
            page_table_BM=self.page_table_BM,
            cu_q_lens_B1=jnp.concatenate([jnp.zeros(1, jnp.int32), self.rows_4B[RowField.Q_END]]),
            distribution_2=self.rows_4B[RowField.NUM_DECODE :, 0],
            slot_mapping_T=self.tokens_4T[TokenField.CACHE_SLOT],
            positions_T=self.tokens_4T[TokenField.POSITION],
        )


class BatchLayout(NamedTuple):
    """The sizes that a batch is built for and padded to.

    Attributes:
        max_rows: rows of per-request state; index `max_rows` is a spare, neutral row.
        page_size, num_pages: sizes of the KV pool; writes to slots past it are dropped.
        pages_per_row: M.
        vocab_size: also the value of top-k without a limit.
    """

    max_rows: int
    page_size: int
    num_pages: int
    pages_per_row: int
    vocab_size: int


class RowTable:
    """Holds the sampling parameters of running requests, by row, and builds batches from them."""

    def __init__(self, layout: BatchLayout) -> None:
        self._layout = layout
        num_rows = layout.max_rows + 1
        self._floats_6R = np.zeros((len(DEVICE_FIELDS), num_rows), np.float32)
        self._seeds_R2 = np.zeros((num_rows, 2), np.uint32)
        self._top_k_R = np.zeros(num_rows, np.int32)
        self._min_tokens_R = np.zeros(num_rows, np.int32)
        self._flags_R = np.zeros(num_rows, np.int32)
        self._lora_slot_R = np.zeros(num_rows, np.int32)
        self._pages_RM = np.zeros((num_rows, layout.pages_per_row), np.int32)
        self._num_pages_R = np.zeros(num_rows, np.int32)
        # The spare row is neutral.
        self._floats_6R[:, layout.max_rows] = _device_floats(SamplingParams(temperature=0))
        self._top_k_R[layout.max_rows] = layout.vocab_size

    def admit(self, new: NewRow) -> None:
        """Assign a row to a new sequence."""
        sampling = new.sampling
        self._num_pages_R[new.row] = 0
        self._floats_6R[:, new.row] = _device_floats(sampling)
        seed = new.seed % 2**64
        self._seeds_R2[new.row] = seed & 0xFFFFFFFF, seed >> 32
        self._top_k_R[new.row] = sampling.top_k if sampling.top_k > 0 else self._layout.vocab_size
        self._min_tokens_R[new.row] = sampling.min_tokens
        self._lora_slot_R[new.row] = new.adapter_slot
        biased = SampleFlag.BIASED if sampling.logit_bias else 0
        self._flags_R[new.row] = biased | (SampleFlag.LOGPROBS if sampling.num_logprobs is not None else 0)

    def uses_adapters(self, plan: SchedulerOutput) -> bool:
        """Return whether any row of the plan has an adapter."""
        return any(self._lora_slot_R[row.row] for row in plan.rows)

    def build(self, plan: SchedulerOutput, bucket: Bucket) -> ForwardBatch:
        """Build the batch of a plan, padded to a bucket."""
        layout = self._layout
        count = len(plan.rows)
        row_b = np.fromiter((row.row for row in plan.rows), np.int32, count)
        length_b = np.fromiter((row.num_tokens for row in plan.rows), np.int32, count)
        start_b = np.fromiter((row.num_computed_tokens for row in plan.rows), np.int32, count)
        end_b = np.cumsum(length_b)
        total = int(end_b[-1]) if count else 0
        self._add_pages(plan)

        tokens_4T = np.zeros((4, bucket.num_tokens), np.int32)
        ids_t, position_t, slot_t, lora_slot_t = (tokens_4T[field, :total] for field in TokenField)
        ids_t[:] = np.fromiter(chain.from_iterable(row.token_ids for row in plan.rows), np.int32, total)
        last_b = ids_t[end_b - 1]
        ids_t[end_b - 1] = np.where(last_b < 0, -1 - row_b, last_b)
        position_t[:] = np.arange(total) + np.repeat(start_b - end_b + length_b, length_b)
        page_t = self._pages_RM[np.repeat(row_b, length_b), position_t // layout.page_size]
        slot_t[:] = page_t * layout.page_size + position_t % layout.page_size
        tokens_4T[TokenField.CACHE_SLOT, total:] = layout.num_pages * layout.page_size
        lora_slot_t[:] = np.repeat(self._lora_slot_R[row_b], length_b)

        rows_4B = np.zeros((4, bucket.num_rows), np.int32)
        rows_4B[RowField.KV_LEN, :count] = start_b + length_b
        rows_4B[RowField.Q_END, :count] = end_b
        rows_4B[RowField.Q_END, count:] = total
        rows_4B[RowField.NUM_DECODE, 0] = np.count_nonzero(length_b == 1)
        rows_4B[RowField.NUM_ROWS, 0] = count
        page_table_BM = np.zeros((bucket.num_rows, layout.pages_per_row), np.int32)
        page_table_BM[:count] = self._pages_RM[row_b]

        sample = self.sample_batch(plan, end_b - length_b, bucket.num_rows)
        return ForwardBatch(tokens_4T, rows_4B, page_table_BM, sample)

    def _add_pages(self, plan: SchedulerOutput) -> None:
        for row in plan.rows:
            if row.new_page_ids:
                first = self._num_pages_R[row.row]
                end = first + len(row.new_page_ids)
                self._pages_RM[row.row, first:end] = row.new_page_ids
                self._num_pages_R[row.row] = end

    def sample_batch(self, plan: SchedulerOutput, first_token_b: np.ndarray, num_rows: int) -> SampleBatch:
        """Build the sampling inputs: logits at each row's last token, or at every token for prompt log-probabilities.

        Args:
            plan: the step.
            first_token_b: index of each row's first token among the packed tokens.
            num_rows: number of rows of logits in the bucket.
        """
        spare = self._layout.max_rows
        ints_8B = np.zeros((len(SampleField), num_rows), np.int32)
        ints_8B[SampleField.STATE_ROW] = spare
        ints_8B[SampleField.WRITE_ROW] = spare + 1  # past the state: the write is dropped
        ints_8B[SampleField.TARGET] = -1
        index = 0
        for row, first in zip(plan.rows, first_token_b.tolist(), strict=True):
            if row.prompt_targets:
                count = len(row.prompt_targets)
                ints_8B[SampleField.TOKEN_INDEX, index : index + count] = np.arange(first, first + count)
                ints_8B[SampleField.TARGET, index : index + count] = row.prompt_targets
                ints_8B[SampleField.FLAGS, index : index + count] = SampleFlag.LOGPROBS
                index += count
            if len(row.prompt_targets) < row.num_tokens:
                column = ints_8B[:, index]
                column[SampleField.TOKEN_INDEX] = first + row.num_tokens - 1
                column[SampleField.STATE_ROW] = row.row
                column[SampleField.WRITE_ROW] = row.row if row.samples else spare + 1
                column[SampleField.POSITION] = row.num_computed_tokens + row.num_tokens
                if row.num_output_tokens < self._min_tokens_R[row.row]:
                    column[SampleField.FLAGS] = SampleFlag.FORBID_STOPS
                index += 1
        state_row_B = ints_8B[SampleField.STATE_ROW]
        ints_8B[SampleField.TOP_K] = self._top_k_R[state_row_B]
        ints_8B[SampleField.FLAGS] |= self._flags_R[state_row_B]
        ints_8B[SampleField.LORA_SLOT] = self._lora_slot_R[state_row_B]
        return SampleBatch(ints_8B, self._floats_6R[:, state_row_B], self._seeds_R2[state_row_B])


def _device_floats(sampling: SamplingParams) -> list[float]:
    """Return the values of `DEVICE_FIELDS`; temperature 0 selects argmax in the kernels."""
    values = {field.name: float(getattr(sampling, field.name)) for field in DEVICE_FIELDS}
    if sampling.greedy:
        values["temperature"] = 0.0
    return list(values.values())
