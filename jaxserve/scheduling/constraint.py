"""What the scheduler asks of whatever limits an output."""

from typing import Protocol


class Constraint(Protocol):
    """What the scheduler needs of a constraint."""

    @property
    def masked(self) -> bool:
        """Whether the next draw may only be some tokens."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the output is complete: nothing may follow."""
        ...

    @property
    def error(self) -> str | None:
        """Why nothing can be drawn any more, if so."""
        ...

    def take(self, token_id: int) -> None:
        """The output goes on with this token."""
        ...

    def forced(self) -> list[int]:
        """Tokens that must come next, if only they can; asking changes nothing."""
        ...
