"""Bounded store of responses that can be continued, retrieved, cancelled and deleted; the oldest are evicted first."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from api.chat.schemas import ChatMessage
from api.responses.schemas import ResponseObject
from jaxserve.errors import NotFoundError

_MAX_RESPONSES = 1024
_MAX_BYTES = 64 << 20


@dataclass
class StoredResponse:
    """One stored response.

    Attributes:
        response: the response as it was last sent to the client.
        size: approximate size in bytes.
        turns: the conversation including this response; empty until the response is complete.
        cancel: cancels the response; None once it has ended.
    """

    response: ResponseObject
    size: int
    turns: Sequence[ChatMessage] = ()
    cancel: Callable[[], None] | None = None


class ResponseStore:
    """The responses of one server, by id."""

    def __init__(self) -> None:
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_bytes = 0

    def add(self, stored: StoredResponse) -> None:
        """Store a response that has begun."""
        self._responses[stored.response.id] = stored
        self._num_bytes += stored.size
        self._shrink()

    def end(self, response_id: str, turns: Sequence[ChatMessage] = ()) -> None:
        """Record the end of a response, with its conversation if that can be continued.

        Does nothing if the response has already ended or is no longer stored.
        """
        stored = self._responses.get(response_id)
        if stored is None or stored.cancel is None:
            return
        earlier = sum(len(turn.content or "") + len(turn.reasoning_content or "") for turn in turns)
        stored.turns, stored.cancel = turns, None
        stored.size += earlier
        self._num_bytes += earlier
        self._shrink()

    def get(self, response_id: str, param: str | None = None) -> StoredResponse:
        """Return a stored response.

        Raises:
            NotFoundError: the response does not exist, or is no longer stored.
        """
        stored = self._responses.get(response_id)
        if stored is None:
            raise NotFoundError(f"no stored response with id {response_id[:80]!r}", param=param, code="not_found")
        return stored

    def remove(self, response_id: str) -> None:
        """Delete a response; raises NotFoundError if it is not stored."""
        self._num_bytes -= self.get(response_id).size
        del self._responses[response_id]

    def _shrink(self) -> None:
        while len(self._responses) > _MAX_RESPONSES or self._num_bytes > _MAX_BYTES:
            _, oldest = self._responses.popitem(last=False)
            self._num_bytes -= oldest.size
