"""Inputs and outputs of a step: the whole interface between scheduling and the runner.

Host data only. A `SchedulerOutput` is serialisable, and multi-host runs broadcast it.
"""

from typing import TypeAlias

import msgspec
import numpy as np

from jaxserve.sampling_params import SamplingParams


class NewRow(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence that gets a row in this step, with all data that the runner needs while it runs.

    Attributes:
        row: index into the runner's per-row state, fixed while the sequence runs.
        sampling: sampling parameters.
        seed: sampling key with the choice index folded in; u64.
        eos_token_ids: tokens forbidden before `min_tokens` output tokens, including stop tokens.
        output_token_ids: tokens sampled before a preemption; penalties count them.
        adapter_slot: slot of the LoRA adapter; 0 for none.
    """

    row: int
    sampling: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()
    adapter_slot: int = 0


class AdapterLoad(msgspec.Struct, frozen=True):
    """An adapter to load into a slot before the step runs."""

    slot: int
    key: str


class ScheduledRow(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence's share of a step.

    Attributes:
        row: the sequence's row.
        token_ids: tokens to run; a trailing -1 is a placeholder for the token that the previous step samples.
        num_computed_tokens: tokens whose keys and values are already in the cache; position of the first to run.
        new_page_ids: pages added to the row since its last step, in order; all of its pages after a `NewRow`.
        samples: whether a token is sampled after the last one; otherwise the row is a prefill chunk.
        num_output_tokens: output tokens before this step's sample.
        prompt_targets: the prompt token after each token run, if prompt log-probabilities are wanted.
        wants_logprobs: the most likely alternatives of the sampled token are wanted.
    """

    row: int
    token_ids: tuple[int, ...]
    num_computed_tokens: int
    new_page_ids: tuple[int, ...]
    samples: bool
    num_output_tokens: int = 0
    prompt_targets: tuple[int, ...] = ()
    wants_logprobs: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens run in this step."""
        return len(self.token_ids)

    @property
    def num_logits_rows(self) -> int:
        """Number of rows of logits that the step computes for this sequence."""
        return self.num_tokens if self.prompt_targets else 1


class SchedulerOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One step. Rows that run a single token come first.

    Attributes:
        step: step number, counting up from 0.
        new_rows: rows that get a new sequence in this step.
        rows: rows that run.
        adapter_loads: adapters to load into slots before the step runs.
    """

    step: int
    new_rows: tuple[NewRow, ...]
    rows: tuple[ScheduledRow, ...]
    adapter_loads: tuple[AdapterLoad, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number of tokens run in this step over all rows."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_logits_rows(self) -> int:
        """Number of rows of logits computed in this step."""
        return sum(row.num_logits_rows for row in self.rows)


class ConstrainedRows(msgspec.Struct, frozen=True):
    """Rows of a plan whose sampling is constrained.

    Attributes:
        rows: indices of the C rows in the plan.
        bits_CW: i32; bit v % 32 of word v // 32 is set if token v is allowed.
    """

    rows: tuple[int, ...]
    bits_CW: np.ndarray


# One step of every replica; None for a replica that has nothing to run.
Plans: TypeAlias = tuple[SchedulerOutput | None, ...]


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of the C tokens in a row's `prompt_targets`, with J alternatives each, in order."""

    logprobs_C: np.ndarray
    top_ids_CJ: np.ndarray
    top_logprobs_CJ: np.ndarray


class StepOutput(msgspec.Struct, frozen=True, kw_only=True):
    """Results of a step, as numpy arrays on the host. B = rows of the plan, in its order.

    Attributes:
        token_ids_B: i32, the sampled token; meaningless if the row does not sample.
        finite_B: bool, False if the row's logits held NaN or no token could be sampled.
        logprobs_B: f32 log-probability of the sampled token; 0 unless some row wanted it.
        top_ids_BJ, top_logprobs_BJ: most likely tokens in order and their log-probabilities; None unless wanted.
        prompt: prompt log-probabilities by index of the row in the plan, for rows with `prompt_targets`.
    """

    token_ids_B: np.ndarray
    finite_B: np.ndarray
    logprobs_B: np.ndarray
    top_ids_BJ: np.ndarray | None = None
    top_logprobs_BJ: np.ndarray | None = None
    prompt: dict[int, PromptLogprobs] = {}
