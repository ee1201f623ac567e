"""Responses that can be followed, retrieved, cancelled and deleted. Bounded; the oldest are forgotten first."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from api.responses_schemas import ResponseObject
from api.schemas import ChatMessage
from jaxserve.errors import NotFoundError

_MAX_RESPONSES = 1024
_MAX_CHARACTERS = 64 << 20


@dataclass
class StoredResponse:
    """One response.

    Attributes:
        response: as it was last told to the client.
        turns: the conversation with its answer; empty while it is not complete.
        cancel: ends it while it runs.
    """

    response: ResponseObject
    turns: Sequence[ChatMessage] = ()
    cancel: Callable[[], None] | None = None

    @property
    def num_characters(self) -> int:
        """What its conversation takes, roughly."""
        return sum(len(turn.content or "") + len(turn.reasoning_content or "") for turn in self.turns)


class ResponseStore:
    """The responses of one server, by id."""

    def __init__(self) -> None:
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_characters = 0

    def add(self, stored: StoredResponse) -> None:
        """Keep a response that has begun."""
        self._responses[stored.response.id] = stored
        self._shrink()

    def complete(self, response_id: str, response: ResponseObject, turns: Sequence[ChatMessage]) -> None:
        """A response has ended; nothing happens if it was deleted meanwhile."""
        stored = self._responses.get(response_id)
        if stored is None:
            return
        self._num_characters -= stored.num_characters
        stored.response, stored.turns, stored.cancel = response, turns, None
        self._num_characters += stored.num_characters
        self._shrink()

    def get(self, response_id: str, param: str | None = None) -> StoredResponse:
        """A kept response.

        Raises:
            NotFoundError: there is none, or not any more.
        """
        stored = self._responses.get(response_id)
        if stored is None:
            raise NotFoundError(f"no response with id {response_id[:80]!r} is kept", param=param, code="not_found")
        return stored

    def remove(self, response_id: str) -> None:
        """Forget a response; raises NotFoundError if there is none."""
        self._num_characters -= self.get(response_id).num_characters
        del self._responses[response_id]

    def _shrink(self) -> None:
        while len(self._responses) > _MAX_RESPONSES or self._num_characters > _MAX_CHARACTERS:
            _, oldest = self._responses.popitem(last=False)
            self._num_characters -= oldest.num_characters
