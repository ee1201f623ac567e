"""Finds the sequence that makes steps fail: after a step that raised, the sequences of that step run one at a time.

The exception does not identify the sequence at fault, so all of them are quarantined: each runs alone until it has
passed the point that it had reached. A sequence whose steps fail while it is alone is ended, so that the others can
continue.
"""

from collections.abc import Iterable

from jaxserve.scheduling.sequence import Sequence

_MAX_FAILED_STEPS = 2


class Quarantine:
    """The quarantined sequences of a scheduler, in the order in which they run."""

    def __init__(self) -> None:
        self._sequences: dict[Sequence, None] = {}

    def __bool__(self) -> bool:
        """Whether any sequence is quarantined."""
        return bool(self._sequences)

    @property
    def first(self) -> Sequence:
        """The sequence that runs next."""
        return next(iter(self._sequences))

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Quarantine the sequences of steps that failed."""
        for sequence in sequences:
            if not sequence.finished:
                sequence.num_tokens_at_failure = max(sequence.num_tokens_at_failure, sequence.num_computed_tokens)
                self._sequences[sequence] = None

    def passed(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """Release a sequence that has passed the point at which its step failed."""
        if num_computed_tokens >= sequence.num_tokens_at_failure:
            self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Release a sequence, if it is quarantined."""
        self._sequences.pop(sequence, None)

    def failed_alone(self, sequence: Sequence) -> bool:
        """Count a failed step in which the sequence was alone; return True if the sequence must be ended."""
        sequence.num_failed_steps += 1
        return sequence.num_failed_steps == _MAX_FAILED_STEPS and not sequence.finished
