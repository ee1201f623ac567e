"""Server-sent events, and handling of clients that disconnect."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeAlias, TypeVar

import msgspec
from litestar import Response
from litestar.types import ASGIApp, Receive, Scope, Send

from api.errors import stream_error

Closer: TypeAlias = Callable[[], None]

T = TypeVar("T")

_encoder = msgspec.json.Encoder()

DONE = b"data: [DONE]\n\n"


def event(payload: msgspec.Struct) -> bytes:
    """Encode one event; its JSON contains no line breaks, so it fits one data line."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


def named_event(name: str, payload: Any) -> bytes:
    """Encode one named event, as used by the Responses and Messages protocols."""
    return b"event: " + name.encode() + b"\ndata: " + _encoder.encode(payload) + b"\n\n"


def error_event(error: Exception) -> bytes:
    """Encode an error as an event, for a stream that has already begun."""
    return event(stream_error(error))


class ClientGone(Exception):
    """The client closed its connection before the response was ready."""


class EventStream(Response[None]):
    """A response that sends events and calls `close` however it ends, even if it never starts.

    Args:
        events: encoded events; an exception becomes an error event and ends the stream.
        close: releases the request; synchronous, because a cancelled task cannot wait.
        error: encodes an exception as an event.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], close: Closer, *, error: Callable[[Exception], bytes] = error_event
    ) -> None:
        super().__init__(None)
        self._events = events
        self._close = close
        self._error = error

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIApp:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return this response's own ASGI app; Litestar calls this hook."""
        return self._serve

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        gone = asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait((pump, gone), return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            pump.cancel()
            gone.cancel()
            self._close()

    async def _pump(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})  # type: ignore[typeddict-item]
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            data = self._error(error)
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T], close: Closer) -> T:
    """Await `work`; if the client disconnects first, cancel it. Calls `close` in any case.

    Raises:
        ClientGone: the client disconnected.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        close()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merge(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """Yield the items of several streams as they arrive, each with its stream's index."""
    if len(streams) == 1:
        async for item in streams[0]:
            yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[T]) -> None:
        try:
            async for item in stream:
                queue.put_nowait((index, item))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            match await queue.get():
                case None:
                    left -= 1
                case BaseException() as error:
                    raise error
                case item:
                    yield item
    finally:
        for task in tasks:
            task.cancel()
