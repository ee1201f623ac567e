"""How the API reaches an engine: one protocol, in this process or in another."""

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
    """A running engine."""

    @property
    def info(self) -> EngineInfo:
        """What was loaded; raises UnavailableError until the engine is ready."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The engine's last word on itself."""
        ...

    @property
    def num_live(self) -> int:
        """Choices submitted and not yet finished."""
        ...

    def check_ready(self) -> None:
        """Raise UnavailableError when the engine loads or is lost."""
        ...

    def check_capacity(self, num_choices: int) -> None:
        """Raise unless so many more choices may run or wait.

        Raises:
            RequestError: so many never may.
            OverloadedError: the queue is full.
            UnavailableError: the engine is not there.
        """
        ...

    def use_tokenizer(self, tokenizer: GrammarTokenizer) -> None:
        """Tell the engine the tokenizer; it takes constrained requests from then on."""
        ...

    def submit(self, request: Request) -> "TokenStream":
        """Queue a request at once; closing its stream early aborts it.

        Raises:
            OverloadedError: the queue is full.
            UnavailableError: the engine is not there.
        """
        ...

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice of it; never waits."""
        ...

    async def flush_cache(self) -> bool:
        """Forget cached prefixes; False while requests run."""
        ...

    async def load_adapter(self, source: AdapterSource) -> None:
        """Read a LoRA adapter; requests may have its key from then on.

        Raises:
            AdapterError: it cannot be read, or does not fit the model.
            UnavailableError: the engine is not there.
        """
        ...

    async def unload_adapter(self, key: str) -> None:
        """Let a LoRA adapter go after the last request that was submitted with it.

        Raises:
            AdapterError: it is not loaded.
            UnavailableError: the engine is not there.
        """
        ...


class TokenStream:
    """The deltas of one request, in order. Iterate, and `close` in any case."""

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
        """Choices whose last delta has not come."""
        return len(self._open)

    def deliver(self, delta: TokenDelta) -> None:
        """Add a delta; what comes after a choice's last one is dropped."""
        if delta.choice not in self._open:
            return
        if delta.finish_reason is not None:
            self._open.remove(delta.choice)
        self._queue.put_nowait(delta)

    def fail(self, error: str) -> None:
        """End every choice that is still open."""
        for choice in sorted(self._open):
            self.deliver(
                TokenDelta(request_id=self._request.id, choice=choice, finish_reason=FinishReason.ERROR, error=error)
            )

    def close(self) -> None:
        """Abort the request in the engine if it is still running. Synchronous, so it works anywhere."""
        self._on_close(self._request.id)


class Streams:
    """The open requests of a client."""

    def __init__(self) -> None:
        self._streams: dict[str, TokenStream] = {}

    @property
    def num_live(self) -> int:
        """Choices that have not ended."""
        return sum(stream.num_open_choices for stream in self._streams.values())

    def add(self, request: Request, on_close: Callable[[str], None]) -> TokenStream:
        """Register a request; its id must be new."""
        if request.id in self._streams:
            raise ValueError(f"request id {request.id!r} is in use")
        stream = TokenStream(request, on_close)
        self._streams[request.id] = stream
        return stream

    def deliver(self, delta: TokenDelta) -> None:
        """Hand a delta to its request; late ones for requests that are gone are dropped."""
        if (stream := self._streams.get(delta.request_id)) is not None:
            stream.deliver(delta)

    def remove(self, request_id: str) -> bool:
        """Forget a request; True if the engine still works on it."""
        stream = self._streams.pop(request_id, None)
        return stream is not None and stream.num_open_choices > 0

    def fail_all(self, error: str) -> None:
        """End every open request."""
        for stream in self._streams.values():
            stream.fail(error)


class AdapterAnswers:
    """Who waits for what becomes of an adapter, by the adapter's key; of one event loop."""

    def __init__(self) -> None:
        self._futures: dict[str, asyncio.Future[str | None]] = {}

    async def ask(self, key: str, send: Callable[[], None]) -> None:
        """Send a question and wait for its answer.

        Raises:
            AdapterError: the answer is that something is wrong.
            UnavailableError: there will be no answer.
        """
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._futures[key] = future
        send()
        if (error := await future) is not None:
            raise AdapterError(error)

    def report(self, key: str, error: str | None) -> None:
        """What is wrong, or None."""
        future = self._futures.pop(key, None)
        if future is not None and not future.done():
            future.set_result(error)

    def fail_all(self, lost: str) -> None:
        """The engine is gone."""
        for future in self._futures.values():
            if not future.done():
                future.set_exception(UnavailableError(lost))
        self._futures.clear()
