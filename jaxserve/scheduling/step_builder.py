"""Builds the plan of a step."""

from jaxserve.config import SchedulerConfig
from jaxserve.scheduling.sequence import Sequence
from jaxserve.step import AdapterLoad, NewRow, ScheduledRow, SchedulerOutput


class StepBuilder:
    """The step being planned: its rows, and what is left of its budgets."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.num_tokens_left = config.max_step_tokens
        self.num_logits_rows_left = config.max_rows
        self.rows: list[ScheduledRow] = []
        self.sequences: list[Sequence] = []
        self._new_rows: list[NewRow] = []

    def token_budget_for(self, sequence: Sequence) -> int:
        """Return the number of tokens that the sequence may run in this step."""
        if not self.num_logits_rows_left:
            return 0
        count = min(sequence.num_uncomputed_tokens, self.num_tokens_left)
        return min(count, self.num_logits_rows_left) if sequence.collects_prompt_logprobs else count

    def admit(self, sequence: Sequence, adapter_slot: int) -> None:
        """Announce a sequence that has been given a row for this step."""
        assert sequence.row is not None
        self._new_rows.append(
            NewRow(
                row=sequence.row,
                sampling=sequence.request.sampling,
                seed=sequence.seed,
                eos_token_ids=sequence.request.eos_token_ids,
                output_token_ids=tuple(sequence.output_token_ids),
                adapter_slot=adapter_slot,
            )
        )

    def add(self, sequence: Sequence, count: int) -> None:
        """Run the sequence's next `count` tokens."""
        assert sequence.row is not None
        start = sequence.num_computed_tokens
        end = start + count
        known = sequence.token_ids[start:end]
        samples = end == sequence.num_tokens and sequence.num_output_tokens < sequence.request.sampling.max_tokens
        targets: tuple[int, ...] = ()
        if sequence.collects_prompt_logprobs:
            targets = sequence.request.prompt_token_ids[start + 1 : end + 1]
        row = ScheduledRow(
            row=sequence.row,
            token_ids=tuple(known) if len(known) == count else (*known, -1),
            num_computed_tokens=start,
            new_page_ids=tuple(sequence.pages[sequence.num_sent_pages :]),
            samples=samples,
            num_output_tokens=sequence.num_output_tokens,
            prompt_targets=targets,
            wants_logprobs=sequence.request.sampling.num_logprobs is not None,
        )
        self.rows.append(row)
        self.sequences.append(sequence)
        sequence.num_computed_tokens = end
        sequence.num_sent_pages = len(sequence.pages)
        sequence.num_in_flight += samples
        self.num_tokens_left -= count
        self.num_logits_rows_left -= row.num_logits_rows

    def drop(self, sequence: Sequence) -> None:
        """Remove a sequence that was preempted after it had been added; ignored if it was not added."""
        if sequence not in self.sequences:
            return
        index = self.sequences.index(sequence)
        row = self.rows.pop(index)
        self.sequences.pop(index)
        sequence.num_in_flight -= row.samples
        self.num_tokens_left += row.num_tokens
        self.num_logits_rows_left += row.num_logits_rows

    def finish(self, step: int, adapter_loads: tuple[AdapterLoad, ...]) -> SchedulerOutput:
        """Return the plan, with the rows that run a single token first."""
        order = sorted(range(len(self.rows)), key=lambda index: self.rows[index].num_tokens > 1)
        self.rows = [self.rows[index] for index in order]
        self.sequences = [self.sequences[index] for index in order]
        return SchedulerOutput(
            step=step, new_rows=tuple(self._new_rows), rows=tuple(self.rows), adapter_loads=adapter_loads
        )
