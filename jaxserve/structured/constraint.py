"""Constraint on the next token of one choice, updated with every token and queried before each is sampled."""

import codecs
from collections import deque
from typing import Protocol

from llguidance import LLMatcher

from jaxserve.request import ThinkingBudget


class ThinkingState:
    """Counts the thinking tokens of an output, and forces the end of thinking when the budget is used up.

    Args:
        thinking: markers and budget.

    Attributes:
        queue: remaining tokens of the end sequence, once it is forced.
    """

    def __init__(self, thinking: ThinkingBudget) -> None:
        self._thinking = thinking
        self._in_reasoning = thinking.in_reasoning
        self._over = False
        self._num_left = thinking.budget
        self._tail = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.queue: deque[int] = deque()
        self._close_if_used_up()

    def take(self, token_id: int, data: bytes) -> None:
        """Update the state with the next token of the output and the token's bytes."""
        if self.queue:
            assert token_id == self.queue.popleft()
        if self._over:
            return
        self._tail += self._decoder.decode(data)
        self._num_left -= self._in_reasoning
        thinking = self._thinking
        markers = (thinking.end, *thinking.early_end_markers) if self._in_reasoning else (thinking.start,)
        if any(marker in self._tail for marker in markers):
            self._over = self._in_reasoning and not thinking.allows_multiple
            self._in_reasoning = not self._in_reasoning
            self._tail = ""
        self._tail = self._tail[-max(map(len, markers)) :]
        self._close_if_used_up()

    def _close_if_used_up(self) -> None:
        between_bytes = bool(self._decoder.getstate()[0])
        if self._in_reasoning and self._num_left <= 0 and not (between_bytes or self.queue):
            self._over = not self._thinking.allows_multiple
            self.queue.extend(self._thinking.end_token_ids)


class OutputConstraint:
    """A grammar over the whole output, a limit on its thinking, or both.

    Args:
        matcher: matcher at the start of its grammar, or None.
        budget: thinking state at the start of the output, or None.
        token_bytes: returns the bytes of a token; used by the budget.
    """

    def __init__(self, matcher: LLMatcher | None, budget: ThinkingState | None, token_bytes: "TokenBytesOf") -> None:
        self.matcher = matcher
        self._budget = budget
        self._token_bytes = token_bytes

    @property
    def masked(self) -> bool:
        """See `scheduling.constraint.Constraint`."""
        return self.matcher is not None or self.only_token is not None

    @property
    def only_token(self) -> int | None:
        """The only token that may come next while the end of thinking is forced; None otherwise."""
        return self._budget.queue[0] if self._budget is not None and self._budget.queue else None

    @property
    def finished(self) -> bool:
        """See `scheduling.constraint.Constraint`."""
        return self.matcher is not None and self.matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """See `scheduling.constraint.Constraint`."""
        if self.matcher is None or not self.matcher.is_error():
            return None
        return self.matcher.get_error().splitlines()[0][:200]

    def take(self, token_id: int) -> None:
        """See `scheduling.constraint.Constraint`."""
        if self._budget is not None:
            self._budget.take(token_id, self._token_bytes(token_id))
        if self.matcher is not None:
            self.matcher.consume_token(token_id)

    def forced(self) -> list[int]:
        """See `scheduling.constraint.Constraint`."""
        if self._budget is not None and self._budget.queue:
            return list(self._budget.queue)
        return [] if self.matcher is None else self.matcher.compute_ff_tokens()


class TokenBytesOf(Protocol):
    """Maps token ids to bytes."""

    def __call__(self, token_id: int) -> bytes:
        """Return the bytes of the token with this id."""
        ...
