"""How the API reaches an engine: one protocol, in this process or in another."""

import asyncio
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Protocol, Self

import msgspec
import zmq
import zmq.asyncio

from jaxserve.config import EngineConfig
from jaxserve.errors import AdapterError, ExitCode, LaunchError, OverloadedError, RequestError, UnavailableError
from jaxserve.messages import (
    Abort,
    AdapterAnswer,
    CacheFlushed,
    Deltas,
    EngineInfo,
    EngineStats,
    FlushCache,
    LoadAdapter,
    Ready,
    Shutdown,
    StartFailed,
    Submit,
    ToEngine,
    UnloadAdapter,
    UseTokenizer,
    decode_from_engine,
    encode,
)
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

    def check_room(self, num_choices: int) -> None:
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
        """Nobody reads any more: the engine is told if it still works on it. Synchronous, so it works anywhere."""
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

    def tell(self, key: str, error: str | None) -> None:
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


class ProcessEngineClient:
    """An engine in a process of its own.

    Args:
        config: what to load.
        max_queued: choices that may wait beside those that run; None for no limit.
    """

    def __init__(self, config: EngineConfig, max_queued: int | None) -> None:
        self._config = config
        self._max_queued = max_queued
        self._streams = Streams()
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._lost: str | None = None
        self._flushes: list[asyncio.Future[bool]] = []
        self._adapter_answers = AdapterAnswers()
        self._folder = tempfile.mkdtemp(prefix="jaxserve-")
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._process: subprocess.Popen[bytes] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.exited: asyncio.Event = asyncio.Event()

    @property
    def info(self) -> EngineInfo:
        """See `EngineClient`."""
        self.check_ready()
        assert self._info is not None
        return self._info

    @property
    def stats(self) -> EngineStats:
        """See `EngineClient`."""
        return self._stats

    @property
    def num_live(self) -> int:
        """See `EngineClient`."""
        return self._streams.num_live

    @property
    def exit_code(self) -> int | None:
        """How the engine process ended, if it did."""
        return None if self._process is None else self._process.poll()

    async def start(self) -> EngineInfo:
        """Start the process and wait until it is ready.

        Raises:
            LaunchError: it cannot start.
        """
        endpoint = f"ipc://{self._folder}/engine"
        self._socket.bind(endpoint)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve.worker", endpoint],
            stdin=subprocess.PIPE,
            # A process group of its own: Ctrl-C in a terminal goes to the launcher, which drains first.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._config) + b"\n")
        self._process.stdin.flush()
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[EngineInfo] = loop.create_future()
        self._tasks = [loop.create_task(self._receive(ready)), loop.create_task(self._watch(ready))]
        self._info = await ready
        return self._info

    def check_ready(self) -> None:
        """See `EngineClient`."""
        if self._lost is not None:
            raise UnavailableError(self._lost)
        if self._info is None:
            raise UnavailableError("the model is still loading")

    def check_room(self, num_choices: int) -> None:
        """See `EngineClient`."""
        self.check_ready()
        if self._max_queued is None:
            return
        limit = self.info.max_rows + self._max_queued
        if num_choices > limit:
            raise RequestError(f"{num_choices} choices can never run or wait; the limit is {limit}", param="n")
        if self._streams.num_live + num_choices > limit:
            raise OverloadedError(
                f"{self._streams.num_live} choices run or wait, the limit is {limit}; try again in a second"
            )

    def use_tokenizer(self, tokenizer: GrammarTokenizer) -> None:
        """See `EngineClient`."""
        self._send(UseTokenizer(tokenizer=tokenizer))

    def submit(self, request: Request) -> TokenStream:
        """See `EngineClient`."""
        self.check_room(request.num_choices)
        stream = self._streams.add(request, self._close)
        self._send(Submit(request=request))
        return stream

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """See `EngineClient`."""
        self._send(Abort(request_id=request_id, choice=choice))

    async def flush_cache(self) -> bool:
        """See `EngineClient`."""
        self.check_ready()
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._flushes.append(future)
        self._send(FlushCache())
        return await future

    async def load_adapter(self, source: AdapterSource) -> None:
        """See `EngineClient`."""
        self.check_ready()
        await self._adapter_answers.ask(source.key, lambda: self._send(LoadAdapter(source)))

    async def unload_adapter(self, key: str) -> None:
        """See `EngineClient`."""
        self.check_ready()
        await self._adapter_answers.ask(key, lambda: self._send(UnloadAdapter(key)))

    async def stop(self) -> None:
        """End the process, by force if it does not end by itself."""
        process = self._process
        if process is not None and process.poll() is None and self._info is None:
            process.kill()  # it reads no messages while it loads
        if process is not None and process.poll() is None:
            self._send(Shutdown())
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.exited.wait(), _SHUTDOWN_S)
            if process.poll() is None:
                process.kill()
                await self.exited.wait()
        for task in self._tasks:
            task.cancel()
        self._socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """End the process now; for a launcher that is told twice to stop."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _close(self, request_id: str) -> None:
        if self._streams.remove(request_id):
            self._send(Abort(request_id=request_id))

    def _send(self, message: ToEngine) -> None:
        # Not awaited: with no high-water mark the send is done when the call returns, so this works while a task is
        # being cancelled. It must go through the asyncio socket: ZeroMQ's descriptor is edge-triggered, and a send
        # behind its back can swallow the wake-up for a message that arrives meanwhile.
        if self._lost is None:
            self._socket.send(encode(message))

    async def _receive(self, ready: "asyncio.Future[EngineInfo]") -> None:
        try:
            await self._take_messages(ready)
        except Exception:
            logger.exception("the engine sent what cannot be understood: it is ended")
            self.kill()  # `_watch` tells the rest

    async def _take_messages(self, ready: "asyncio.Future[EngineInfo]") -> None:
        while True:
            match decode_from_engine(await self._socket.recv()):
                case Deltas(deltas=deltas, stats=stats):
                    self._stats = stats
                    for delta in deltas:
                        self._streams.deliver(delta)
                case Ready(info=info):
                    ready.set_result(info)
                case StartFailed(error=error):
                    ready.set_exception(LaunchError(error))
                case CacheFlushed(flushed=flushed):
                    self._flushes.pop(0).set_result(flushed)
                case AdapterAnswer(key=key, error=error):
                    self._adapter_answers.tell(key, error)

    async def _watch(self, ready: "asyncio.Future[EngineInfo]") -> None:
        """Notice the end of the process within a moment, without a thread."""
        assert self._process is not None
        loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(self._process.pid)
        gone: asyncio.Future[None] = loop.create_future()
        loop.add_reader(pidfd, lambda: gone.done() or gone.set_result(None))
        try:
            await gone
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        code = self._process.wait()
        self._lost = f"the engine process ended with code {code}"
        await asyncio.sleep(0.05)  # a StartFailed may still be on its way
        if not ready.done():
            ready.set_exception(LaunchError(self._lost, exit_code=ExitCode.ENGINE_LOST))
        self._streams.fail_all(self._lost)
        self._adapter_answers.fail_all(self._lost)
        for future in self._flushes:
            if not future.done():
                future.set_exception(UnavailableError(self._lost))
        self.exited.set()
