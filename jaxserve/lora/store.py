"""LoRA adapters on the host: which are in memory, which are read again on demand, and which requests use them."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from jaxserve.errors import AdapterError
from jaxserve.request import AdapterSource, Request, TokenDelta, adapter_name
from jaxserve.runner_protocol import LoadedAdapter, RunnerAdapters
from jaxserve.scheduling.adapter_slots import AdapterSlots

logger = logging.getLogger(__name__)

_READ_POLL_S = 0.005

# Called with an error message, or None on success.
OnDone: TypeAlias = Callable[[str | None], None]


class Ready(NamedTuple):
    """A request that was waiting for its adapter.

    Attributes:
        request: the request.
        error: None if it has started; else why the adapter cannot be read.
    """

    request: Request
    error: str | None


@dataclass
class _Entry:
    """An adapter that requests can name.

    Attributes:
        source: the adapter's key and folder.
        digest: digest of the adapter when it was first read; None before.
        in_memory: whether the holder has it.
        evicting: whether it will be evicted for another one once no started request uses it.
        num_requests: number of requests that have begun and not ended.
        num_active: number of those that have been started.
        loaded: called with the result of the first load.
        unloaded: called once the adapter is gone; set when it is to be unloaded.
    """

    source: AdapterSource
    digest: int | None = None
    in_memory: bool = False
    evicting: bool = False
    num_requests: int = 0
    num_active: int = 0
    loaded: OnDone | None = None
    unloaded: OnDone | None = None

    @property
    def open(self) -> bool:
        """Whether new requests may use it."""
        return self.loaded is None and self.unloaded is None


class _Use(NamedTuple):
    """A request that has begun."""

    entry: _Entry
    open_choices: set[int]
    active: bool


class AdapterStore:
    """Adapters by key. Methods are called from one thread; files are read on another, one adapter after the other.

    Args:
        read: reads an adapter folder; raises AdapterError.
        holder: keeps the adapters that are in memory.
        slots: the slots of the device.
        max_loaded: maximum number of adapters in memory; None for no limit. The least recently used one that is not
            pinned is evicted, and is read again when a request asks for it.
        executor: runs the reads; a single thread if None.
    """

    def __init__(
        self,
        read: Callable[[str], LoadedAdapter],
        holder: RunnerAdapters,
        slots: AdapterSlots,
        max_loaded: int | None = None,
        executor: Executor | None = None,
    ) -> None:
        self._read = read
        self._holder = holder
        self._slots = slots
        self._max_loaded = max_loaded
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="adapters")
        # Least recently used first.
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._wanted: OrderedDict[str, None] = OrderedDict()
        self._reading: tuple[str, Future[LoadedAdapter]] | None = None
        # Requests whose adapter is not in memory, by id.
        self._waiting: dict[str, Request] = {}
        self._ready: list[Ready] = []
        self._uses: dict[str, _Use] = {}

    @property
    def idle(self) -> bool:
        """Whether no adapter is being read or waits to be read or unloaded."""
        return (
            not self._reading
            and not self._wanted
            and not any(entry.unloaded is not None for entry in self._entries.values())
        )

    def add(self, source: AdapterSource, adapter: LoadedAdapter) -> None:
        """Add an adapter that the holder already has."""
        entry = self._entries[source.key] = _Entry(source)
        self._note_held(entry, adapter)

    def load(self, source: AdapterSource, loaded: OnDone) -> None:
        """Queue an adapter to be read; its key must be new."""
        assert source.key not in self._entries
        self._entries[source.key] = _Entry(source, loaded=loaded)
        self._wanted[source.key] = None

    def unload(self, key: str, unloaded: OnDone) -> None:
        """Unload an adapter once the last request that uses it has ended."""
        entry = self._entries.get(key)
        if entry is None or not entry.open:
            unloaded(f"the adapter {adapter_name(key)!r} is not loaded")
        else:
            entry.unloaded = unloaded

    def acquire(self, request: Request) -> bool:
        """Keep the adapter of a request until its last choice is released; False if the adapter is not loaded."""
        entry = self._entries.get(request.adapter_key)
        if entry is None or not entry.open:
            return False
        entry.num_requests += 1
        self._uses[request.id] = _Use(entry, set(range(request.num_choices)), active=False)
        return True

    def start(self, request: Request) -> bool:
        """Start a request that has acquired its adapter; if that is not in memory, `work` returns the request later."""
        entry = self._uses[request.id].entry
        self._entries.move_to_end(entry.source.key)
        if entry.in_memory and not entry.evicting:
            self._activate(request)
            return True
        self._waiting[request.id] = request
        self._wanted[entry.source.key] = None
        return False

    def release(self, delta: TokenDelta) -> None:
        """Note the end of a choice; other deltas are ignored."""
        use = self._uses.get(delta.request_id)
        if use is None or delta.finish_reason is None:
            return
        use.open_choices.discard(delta.choice)
        if not use.open_choices:
            self._waiting.pop(delta.request_id, None)
            del self._uses[delta.request_id]
            use.entry.num_requests -= 1
            use.entry.num_active -= use.active

    def work(self, *, wait_for_reading: bool) -> list[Ready]:
        """Take what was read, start the next reading, and drop adapters that are to be unloaded.

        Returns:
            Requests whose wait is over.
        """
        if self._reading is not None:
            key, future = self._reading
            if wait_for_reading:
                wait([future], _READ_POLL_S)
            if future.done():
                self._reading = None
                self._take(self._entries[key], future)
        for entry in list(self._entries.values()):
            if entry.unloaded is not None and not entry.num_requests and not self._is_read(entry):
                self._forget(entry)
        if self._reading is None and self._wanted:
            self._bring(self._entries[next(iter(self._wanted))])
        ready, self._ready = self._ready, []
        return ready

    def _is_read(self, entry: _Entry) -> bool:
        return self._reading is not None and self._reading[0] == entry.source.key

    def _bring(self, entry: _Entry) -> None:
        """Start reading an adapter if memory has capacity for it."""
        if entry.in_memory:  # it was wanted again before it was evicted
            entry.evicting = False
            self._start_waiting(entry)
        elif self._has_capacity():
            self._reading = entry.source.key, self._executor.submit(self._read, entry.source.folder)
        else:
            return
        del self._wanted[entry.source.key]

    def _has_capacity(self) -> bool:
        """Return whether memory has capacity for one more adapter; evict an idle one if necessary."""
        held = [entry for entry in self._entries.values() if entry.in_memory]
        if self._max_loaded is None or len(held) < self._max_loaded:
            return True
        movable = [entry for entry in held if not entry.source.pinned]
        idle = next((entry for entry in movable if not entry.num_active), None)
        if idle is not None:
            self._evict(idle)
            return True
        if movable and not any(entry.evicting for entry in movable):
            # Otherwise steady requests for adapters in memory would keep all others out for ever.
            movable[0].evicting = True
        return False

    def _take(self, entry: _Entry, future: "Future[LoadedAdapter]") -> None:
        """Handle the result of a read."""
        error = future.exception()
        if error is not None:
            self._fail(entry, error)
            return
        adapter = future.result()
        if entry.digest not in (None, adapter.digest):
            self._fail(entry, AdapterError("its files have changed since it was loaded first"))
            return
        self._holder.add_adapter(entry.source.key, adapter)
        self._note_held(entry, adapter)
        if entry.loaded is not None:
            entry.loaded(None)
            entry.loaded = None
        self._start_waiting(entry)

    def _fail(self, entry: _Entry, error: BaseException) -> None:
        key = entry.source.key
        if not isinstance(error, AdapterError):
            logger.error("the adapter %r cannot be read", key, exc_info=error)
        if entry.loaded is not None:
            del self._entries[key]
            entry.loaded(str(error) if isinstance(error, AdapterError) else f"it cannot be read: {error!r}")
            return
        logger.error("the adapter %r cannot be read again: %s", key, error)
        # The reason may name folders, which clients need not know.
        reason = f"the adapter {adapter_name(key)!r} cannot be read again"
        self._ready += [Ready(request, reason) for request in self._take_waiting(entry)]

    def _take_waiting(self, entry: _Entry) -> list[Request]:
        """Remove and return the requests that wait for an adapter."""
        found = [request for request in self._waiting.values() if request.adapter_key == entry.source.key]
        for request in found:
            del self._waiting[request.id]
        return found

    def _start_waiting(self, entry: _Entry) -> None:
        for request in self._take_waiting(entry):
            self._activate(request)
            self._ready.append(Ready(request, None))

    def _activate(self, request: Request) -> None:
        use = self._uses[request.id]
        self._uses[request.id] = use._replace(active=True)
        use.entry.num_active += 1

    def _note_held(self, entry: _Entry, adapter: LoadedAdapter) -> None:
        entry.digest, entry.in_memory = adapter.digest, True
        if entry.source.pinned:
            self._slots.pin(entry.source.key)

    def _evict(self, entry: _Entry) -> None:
        """Remove an adapter from host memory and from its slot: adapters in slots must be in host memory, too."""
        self._slots.forget(entry.source.key)
        self._holder.remove_adapter(entry.source.key)
        entry.in_memory = entry.evicting = False

    def _forget(self, entry: _Entry) -> None:
        assert entry.unloaded is not None
        if entry.in_memory:
            self._evict(entry)
        del self._entries[entry.source.key]
        self._wanted.pop(entry.source.key, None)
        entry.unloaded(None)
