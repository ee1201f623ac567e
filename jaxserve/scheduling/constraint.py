"""The scheduler's interface to constraints on an output."""

from typing import Protocol


class Constraint(Protocol):
    """The state of a constraint in one sequence."""

    @property
    def masked(self) -> bool:
        """Whether a token mask applies to the next sampled token."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the output is complete, so that no token may follow."""
        ...

    @property
    def error(self) -> str | None:
        """The reason why no more tokens can be sampled; None if they can."""
        ...

    def take(self, token_id: int) -> None:
        """Advance the state by the next output token."""
        ...

    def forced(self) -> list[int]:
        """Return the tokens that must come next, if any; does not change the state."""
        ...
