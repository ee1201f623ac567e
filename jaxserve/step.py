"""What a step is asked and what it answers: all that scheduling and the runner share.

Host integers only. A `SchedulerOutput` serialises, so it is also what a multi-host run broadcasts.
"""

from typing import TypeAlias

import msgspec
import numpy as np

from jaxserve.sampling_params import SamplingParams


class NewRow(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence that takes a row in this step, with all the runner must know of it until it leaves.

    Attributes:
        row: fixed index into the runner's per-row state for as long as the sequence runs.
        sampling: how its tokens are drawn.
        seed: key of the draw, the choice index already folded in; u64.
        eos_token_ids: forbidden until `min_tokens` are out, stop tokens included.
        output_token_ids: tokens drawn before a preemption; penalties count them.
        adapter_slot: slot of its LoRA adapter; 0 for none.
    """

    row: int
    sampling: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()
    adapter_slot: int = 0


class AdapterLoad(msgspec.Struct, frozen=True):
    """A slot gets another adapter, before the step runs."""

    slot: int
    adapter: str


class ScheduledRow(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence's share of a step.

    Attributes:
        row: the sequence's row.
        token_ids: the tokens to run; a trailing -1 stands for the token that the step before draws for this row.
        num_computed_tokens: tokens whose keys and values are in the cache already; position of the first to run.
        new_page_ids: pages that the row gained since its last step, in order; all of them after a `NewRow`.
        samples: whether a token is drawn after the last one (else the row is a prefill chunk).
        num_output_tokens: output tokens before this draw.
        prompt_targets: when prompt log-probabilities are wanted, the prompt token that follows each token run.
        wants_logprobs: the draw's likeliest alternatives are wanted.
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
        """Tokens run in this step."""
        return len(self.token_ids)

    @property
    def num_logits_rows(self) -> int:
        """Rows of logits that the step computes for this sequence."""
        return self.num_tokens if self.prompt_targets else 1


class SchedulerOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One step: rows that run one token first, then the longer ones.

    Attributes:
        step: counts up from 0.
        new_rows: rows whose owner changes with this step.
        rows: what runs.
        adapter_loads: what is put into slots before.
    """

    step: int
    new_rows: tuple[NewRow, ...]
    rows: tuple[ScheduledRow, ...]
    adapter_loads: tuple[AdapterLoad, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens run in this step over all rows."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_logits_rows(self) -> int:
        """Rows of logits computed in this step."""
        return sum(row.num_logits_rows for row in self.rows)


class ConstrainedRows(msgspec.Struct, frozen=True):
    """Rows of a plan whose draws are constrained.

    Attributes:
        rows: their indices in the plan, C of them.
        bits_CW: i32; bit v % 32 of word v // 32 is set where token v is allowed.
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
    """What a step drew, as numpy on the host. B = rows of the plan, in its order.

    Attributes:
        token_ids_B: i32, the drawn token; meaningless where the row does not sample.
        finite_B: bool, False where the row's logits held NaN or nothing could be drawn.
        logprobs_B: f32 log-probability of the drawn token; 0 unless some row wanted it.
        top_ids_BJ, top_logprobs_BJ: likeliest tokens in order and their log-probabilities; None unless wanted.
        prompt: by index of the row in the plan, for rows with `prompt_targets`.
    """

    token_ids_B: np.ndarray
    finite_B: np.ndarray
    logprobs_B: np.ndarray
    top_ids_BJ: np.ndarray | None = None
    top_logprobs_BJ: np.ndarray | None = None
    prompt: dict[int, PromptLogprobs] = {}
