"""What one choice may draw next. Told every token, asked before every draw."""

import codecs
from collections import deque
from typing import Protocol

from llguidance import LLMatcher

from jaxserve.request import ThinkingBudget


class ThinkingState:
    """Counts the tokens of an output's thinking and closes it when they are used up.

    Args:
        thinking: markers and limit.

    Attributes:
        queue: the rest of the closing sequence, once it is forced.
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
        """Follow the output by a token and its bytes."""
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
        matcher: fresh, or None.
        budget: fresh, or None.
        token_bytes: bytes of a token, by id; needed by the budget.
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
        """The one token that may come next, where thinking is being closed."""
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
    """Bytes of a token."""

    def __call__(self, token_id: int) -> bytes:
        """Bytes of the token with this id."""
        ...
