"""A client of an engine in this process: a thread steps the engine, an event loop receives its deltas."""

import asyncio
import queue
import threading

from jaxserve.engine.client import AdapterAnswers, Streams, TokenStream
from jaxserve.engine.engine import Engine
from jaxserve.engine.messages import (
    Abort,
    CacheFlushed,
    EngineInfo,
    EngineStats,
    FlushCache,
    LoadAdapter,
    Reply,
    Shutdown,
    Submit,
    ToEngine,
    UnloadAdapter,
    UseTokenizer,
)
from jaxserve.errors import UnavailableError
from jaxserve.request import AdapterSource, GrammarTokenizer, Request, TokenDelta


class InProcessEngineClient:
    """`EngineClient` for an engine object. Its methods must be called on the event loop that created it.

    Args:
        engine: a thread of this client steps it from now on; no other thread may use it.
        info: information about the engine's model.
    """

    def __init__(self, engine: Engine, info: EngineInfo) -> None:
        self._engine = engine
        self._info = info
        self._loop = asyncio.get_running_loop()
        self._streams = Streams()
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._flushed: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._adapter_answers = AdapterAnswers()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        """See `EngineClient`."""
        self.check_ready()
        return self._info

    @property
    def stats(self) -> EngineStats:
        """See `EngineClient`."""
        return EngineStats(**self._engine.stats._asdict())

    @property
    def num_live(self) -> int:
        """See `EngineClient`."""
        return self._streams.num_live

    def check_ready(self) -> None:
        """See `EngineClient`."""
        if self._lost is not None:
            raise UnavailableError(self._lost)

    def check_capacity(self, num_choices: int) -> None:
        """See `EngineClient`. The queue has no limit here."""
        self.check_ready()

    def use_tokenizer(self, tokenizer: GrammarTokenizer) -> None:
        """See `EngineClient`."""
        self._inbox.put(UseTokenizer(tokenizer=tokenizer))

    def submit(self, request: Request) -> TokenStream:
        """See `EngineClient`."""
        self.check_ready()
        stream = self._streams.add(request, self._close)
        self._inbox.put(Submit(request=request))
        return stream

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """See `EngineClient`."""
        self._inbox.put(Abort(request_id=request_id, choice=choice))

    async def flush_cache(self) -> bool:
        """See `EngineClient`."""
        self._inbox.put(FlushCache())
        return await self._loop.run_in_executor(None, self._flushed.get)

    async def load_adapter(self, source: AdapterSource) -> None:
        """See `EngineClient`."""
        self.check_ready()
        await self._adapter_answers.ask(source.key, lambda: self._inbox.put(LoadAdapter(source)))

    async def unload_adapter(self, key: str) -> None:
        """See `EngineClient`."""
        self.check_ready()
        await self._adapter_answers.ask(key, lambda: self._inbox.put(UnloadAdapter(key)))

    def stop(self) -> None:
        """Stop the engine's thread; requests that still run end with an error."""
        self._inbox.put(Shutdown())
        self._thread.join()
        self._lost = self._lost or "the engine was stopped"
        self._loop.call_soon_threadsafe(self._fail_all, self._lost)

    def _close(self, request_id: str) -> None:
        if self._streams.remove(request_id):
            self._inbox.put(Abort(request_id=request_id))

    def _reply(self, answer: Reply) -> None:
        """Pass an answer to its caller; runs on the engine's thread."""
        if isinstance(answer, CacheFlushed):
            self._flushed.put(answer.flushed)
        else:
            self._loop.call_soon_threadsafe(self._adapter_answers.report, answer.key, answer.error)

    def _run(self) -> None:
        try:
            while self._take_messages():
                deltas = self._engine.step()
                if deltas:
                    self._loop.call_soon_threadsafe(self._deliver, deltas)
        except Exception as error:
            self._lost = f"the engine failed: {error}"
            self._loop.call_soon_threadsafe(self._fail_all, self._lost)

    def _fail_all(self, lost: str) -> None:
        self._streams.fail_all(lost)
        self._adapter_answers.fail_all(lost)

    def _take_messages(self) -> bool:
        """Process queued messages, waiting for one while the engine is idle; return False on `Shutdown`."""
        while self._engine.idle or not self._inbox.empty():
            if not self._engine.handle(self._inbox.get(), self._reply):
                return False
        return True

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            self._streams.deliver(delta)
