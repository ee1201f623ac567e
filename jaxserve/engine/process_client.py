"""A client of an engine in its own process, over ZeroMQ."""

import asyncio
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile

import msgspec
import zmq
import zmq.asyncio

from jaxserve.config import EngineConfig
from jaxserve.engine.client import AdapterAnswers, Streams, TokenStream
from jaxserve.engine.messages import (
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
from jaxserve.errors import ExitCode, LaunchError, OverloadedError, RequestError, UnavailableError
from jaxserve.request import AdapterSource, GrammarTokenizer, Request

logger = logging.getLogger(__name__)

_SHUTDOWN_S = 10.0


class ProcessEngineClient:
    """`EngineClient` for an engine in its own process, which this class starts and stops.

    Args:
        config: settings of the engine.
        max_queued: choices that may wait in addition to those that run; None for no limit.
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
        """Exit code of the engine process; None if it has not ended."""
        return None if self._process is None else self._process.poll()

    async def start(self) -> EngineInfo:
        """Start the process and wait until it is ready.

        Raises:
            LaunchError: the engine cannot start.
        """
        endpoint = f"ipc://{self._folder}/engine"
        self._socket.bind(endpoint)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve.engine.process", endpoint],
            stdin=subprocess.PIPE,
            # In its own process group, so that Ctrl-C in a terminal reaches only the launcher, which drains first.
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

    def check_capacity(self, num_choices: int) -> None:
        """See `EngineClient`."""
        self.check_ready()
        if self._max_queued is None:
            return
        limit = self.info.max_rows + self._max_queued
        if num_choices > limit:
            raise RequestError(
                f"{num_choices} choices exceed the limit of running and queued choices, {limit}", param="n"
            )
        if self._streams.num_live + num_choices > limit:
            raise OverloadedError(
                f"{self._streams.num_live} choices run or wait, the limit is {limit}; try again in a second"
            )

    def use_tokenizer(self, tokenizer: GrammarTokenizer) -> None:
        """See `EngineClient`."""
        self._send(UseTokenizer(tokenizer=tokenizer))

    def submit(self, request: Request) -> TokenStream:
        """See `EngineClient`."""
        self.check_capacity(request.num_choices)
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
        """Stop the engine process; kill it if it does not exit by itself."""
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
        """Kill the engine process; the launcher calls this on a second signal."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _close(self, request_id: str) -> None:
        if self._streams.remove(request_id):
            self._send(Abort(request_id=request_id))

    def _send(self, message: ToEngine) -> None:
        # Not awaited: without a high-water mark the send is done when the call returns, so this works while a task is
        # being cancelled. It must go through the asyncio socket: ZeroMQ's descriptor is edge-triggered, and a send
        # that bypasses the socket can swallow the wake-up for a message that arrives meanwhile.
        if self._lost is None:
            self._socket.send(encode(message))

    async def _receive(self, ready: "asyncio.Future[EngineInfo]") -> None:
        try:
            await self._take_messages(ready)
        except Exception:
            logger.exception("the engine process sent an invalid message; killing it")
            self.kill()  # `_watch` handles the exit

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
                    self._adapter_answers.report(key, error)

    async def _watch(self, ready: "asyncio.Future[EngineInfo]") -> None:
        """Wait for the process to exit, without a thread or polling, then fail all open requests."""
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
