"""The API's interface to an engine, which runs in this process or in another."""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol, Self

from jaxserve.engine.messages import (
    EngineInfo,
    EngineStats,
)
from jaxserve.errors import AdapterError, UnavailableError
from jaxserve.request import AdapterSource, FinishReason, GrammarTokenizer, Request, TokenDelta

logger = logging.getLogger(__name__)

_SHUTDOWN_S = 10.0


class EngineClient(Protocol):
    """A client of an engine."""

    @property
    def info(self) -> EngineInfo:
        """Information about the loaded model; raises UnavailableError until the engine is ready."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The engine's latest gauges and counters."""
        ...

    @property
    def num_live(self) -> int:
        """Number of choices that were submitted and have not finished."""
        ...

    def check_ready(self) -> None:
        """Raise UnavailableError if the engine is still loading or is lost."""
        ...

    def check_capacity(self, num_choices: int) -> None:
        """Check that `num_choices` more choices may run or wait.

        Raises:
            RequestError: `num_choices` exceeds the limit even for an empty queue.
            OverloadedError: the queue is full.
            UnavailableError: the engine is still loading or is lost.
        """
        ...

    def use_tokenizer(self, tokenizer: GrammarTokenizer) -> None:
        """Send the tokenizer to the engine, which accepts constrained requests from then on."""
        ...

    def submit(self, request: Request) -> "TokenStream":
        """Queue a request without waiting; closing its stream early aborts it.

        Raises:
            OverloadedError: the queue is full.
            UnavailableError: the engine is still loading or is lost.
        """
        ...

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice of it; never waits."""
        ...

    async def flush_cache(self) -> bool:
        """Forget cached prefixes; do nothing and return False while requests run."""
        ...

    async def load_adapter(self, source: AdapterSource) -> None:
        """Load a LoRA adapter; requests may use its key from then on.

        Raises:
            AdapterError: the adapter cannot be read, or does not fit the model.
            UnavailableError: the engine is still loading or is lost.
        """
        ...

    async def unload_adapter(self, key: str) -> None:
        """Unload a LoRA adapter once the last request that was submitted with it has ended.

        Raises:
            AdapterError: the adapter is not loaded.
            UnavailableError: the engine is still loading or is lost.
        """
        ...


class TokenStream:
    """The deltas of one request, in order. Callers iterate over it and must always `close` it."""

    def __init__(self, request: Request, on_close: Callable[[str], None]) -> None:
        self._request = request
        self._on_close = on_close
        self._queue: asyncio.Queue[TokenDelta] = asyncio.Queue()
        self._unread_choices = request.num_choices
        self._open = set(range(request.num_choices))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenDelta:
        if self._unread_choices == 0:
            raise StopAsyncIteration
        delta = await self._queue.get()
        if delta.finish_reason is not None:
            self._unread_choices -= 1
        return delta

    @property
    def num_open_choices(self) -> int:
        """Number of choices whose last delta has not arrived."""
        return len(self._open)

    def deliver(self, delta: TokenDelta) -> None:
        """Add a delta; deltas after a choice's last one are dropped."""
        if delta.choice not in self._open:
            return
        if delta.finish_reason is not None:
            self._open.remove(delta.choice)
        self._queue.put_nowait(delta)

    def fail(self, error: str) -> None:
        """End every open choice with an error."""
        for choice in sorted(self._open):
            self.deliver(
                TokenDelta(request_id=self._request.id, choice=choice, finish_reason=FinishReason.ERROR, error=error)
            )

    def close(self) -> None:
        """Abort the request in the engine if it is still running. Synchronous, so it works anywhere."""
        self._on_close(self._request.id)


class Streams:
    """The streams of a client's open requests, by request id."""

    def __init__(self) -> None:
        self._streams: dict[str, TokenStream] = {}

    @property
    def num_live(self) -> int:
        """Number of choices that have not ended."""
        return sum(stream.num_open_choices for stream in self._streams.values())

    def add(self, request: Request, on_close: Callable[[str], None]) -> TokenStream:
        """Register a request, whose id must be new, and return its stream."""
        if request.id in self._streams:
            raise ValueError(f"request id {request.id!r} is in use")
        stream = TokenStream(request, on_close)
        self._streams[request.id] = stream
        return stream

    def deliver(self, delta: TokenDelta) -> None:
        """Pass a delta to its request's stream; deltas of requests that were removed are dropped."""
        if (stream := self._streams.get(delta.request_id)) is not None:
            stream.deliver(delta)

    def remove(self, request_id: str) -> bool:
        """Remove a request; return True if the engine is still working on it."""
        stream = self._streams.pop(request_id, None)
        return stream is not None and stream.num_open_choices > 0

    def fail_all(self, error: str) -> None:
        """End every open request with an error."""
        for stream in self._streams.values():
            stream.fail(error)


class AdapterAnswers:
    """Callers that wait for an `AdapterAnswer`, by the adapter's key. Belongs to one event loop."""

    def __init__(self) -> None:
        self._futures: dict[str, asyncio.Future[str | None]] = {}

    async def ask(self, key: str, send: Callable[[], None]) -> None:
        """Send a message and wait for its answer.

        Raises:
            AdapterError: the answer is an error.
            UnavailableError: the engine was lost before it answered.
        """
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._futures[key] = future
        send()
        if (error := await future) is not None:
            raise AdapterError(error)

    def report(self, key: str, error: str | None) -> None:
        """Pass the answer to the waiting caller: an error, or None."""
        future = self._futures.pop(key, None)
        if future is not None and not future.done():
            future.set_result(error)

    def fail_all(self, lost: str) -> None:
        """Raise UnavailableError in every waiting caller."""
        for future in self._futures.values():
            if not future.done():
                future.set_exception(UnavailableError(lost))
        self._futures.clear()
