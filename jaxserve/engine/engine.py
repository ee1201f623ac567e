"""The step loop: schedule, launch the forward pass, process the previous step, launch sampling.

Runs on one thread and knows no transport.

The forward pass of step n + 1 is sent before the tokens of step n reach the host, so the host works while the device
does; the constraints on the tokens of step n + 1 follow once the tokens of step n are known.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxserve.engine.messages import (
    Abort,
    AdapterAnswer,
    CacheFlushed,
    FlushCache,
    LoadAdapter,
    Reply,
    Shutdown,
    Submit,
    ToEngine,
    UnloadAdapter,
    UseTokenizer,
)
from jaxserve.lora.store import AdapterStore, Answer
from jaxserve.request import AdapterSource, FinishReason, GrammarTokenizer, Request, TokenDelta, adapter_name
from jaxserve.runner_protocol import Pending, Runner
from jaxserve.scheduling.data_parallel import DataParallelScheduler
from jaxserve.scheduling.scheduler import SchedulerStats
from jaxserve.step import ConstrainedRows, Plans
from jaxserve.structured.compiler import GrammarCompiler
from jaxserve.structured.constraint import OutputConstraint

logger = logging.getLogger(__name__)

# Times that an empty step is tried after one raised, before the engine gives the devices up.
_MAX_RESETS = 3
_COMPILE_POLL_S = 0.005


# Sends the reply to a message.
SendReply: TypeAlias = Callable[[Reply], None]


class _Compiling(NamedTuple):
    request: Request
    constraints: Future[list[OutputConstraint]]


class Engine:
    """Requests in, token deltas out.

    Args:
        runner: the runner of the model.
        scheduler: decides what it runs.
        vocab_size: vocabulary size of the model.
        adapters: LoRA adapters that requests may name; None where they may name none.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: DataParallelScheduler,
        vocab_size: int,
        adapters: AdapterStore | None = None,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        self._adapters = adapters
        self._pending: Pending | None = None
        self._grammars: GrammarCompiler | None = None
        # Requests whose grammars are being compiled, by id.
        self._compiling: dict[str, _Compiling] = {}
        self._outbox: list[TokenDelta] = []

    @property
    def idle(self) -> bool:
        """Whether `step` would do nothing."""
        adapters_idle = self._adapters is None or self._adapters.idle
        return self._scheduler.idle and adapters_idle and not self._compiling and not self._outbox

    @property
    def stats(self) -> SchedulerStats:
        """Gauges and counters."""
        stats = self._scheduler.stats
        waiting = sum(compiling.request.num_choices for compiling in self._compiling.values())
        if self._adapters is not None:
            waiting += self._adapters.num_parked
        return stats._replace(num_waiting=stats.num_waiting + waiting)

    def handle(self, message: ToEngine, reply: SendReply) -> bool:
        """Do what a message asks for; False if it asks for the shutdown.

        Args:
            message: a message from the API process.
            reply: sends the reply: now, or in a later step for adapters.
        """
        match message:
            case UseTokenizer(tokenizer=tokenizer):
                self.use_tokenizer(tokenizer)
            case Submit(request=request):
                self.add(request)
            case Abort(request_id=request_id, choice=choice):
                self.abort(request_id, choice)
            case FlushCache():
                reply(CacheFlushed(flushed=self.flush_cache()))
            case LoadAdapter(source=source):
                self.load_adapter(source, partial(_answer, reply, source.key))
            case UnloadAdapter(key=key):
                self.unload_adapter(key, partial(_answer, reply, key))
            case Shutdown():
                return False
        return True

    def use_tokenizer(self, tokenizer: GrammarTokenizer) -> None:
        """Take constrained requests from now on."""
        self._grammars = GrammarCompiler(tokenizer, self._vocab_size)

    def load_adapter(self, source: AdapterSource, answer: Answer) -> None:
        """Read a LoRA adapter while requests run; `answer` is called in a later step with the error, or None."""
        if self._adapters is None:
            answer("the engine runs without LoRA")
        else:
            self._adapters.load(source, answer)

    def unload_adapter(self, key: str, answer: Answer) -> None:
        """Take no more requests with an adapter, and let it go after the last one; `answer` is called then."""
        if self._adapters is None:
            answer("the engine runs without LoRA")
        else:
            self._adapters.unload(key, answer)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RuntimeError: it is constrained, and `use_tokenizer` was not called.
        """
        if request.adapter and (self._adapters is None or not self._adapters.begin(request)):
            error = f"the adapter {adapter_name(request.adapter)!r} is not loaded"
            self._end(request, FinishReason.ERROR, error=error, refused=True)
            return
        if not request.constrained:
            self._enter(request)
            return
        if self._grammars is None:
            raise RuntimeError("a constrained request needs a tokenizer")
        self._compiling[request.id] = _Compiling(request, self._grammars.start(request))

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice of it."""
        compiling = self._compiling.get(request_id)
        if compiling is not None:
            if choice is None:  # the client has no output of the choice yet
                del self._compiling[request_id]
                compiling.constraints.cancel()
                self._end(compiling.request, FinishReason.ABORT)
            return
        parked = self._adapters.cancel(request_id) if self._adapters is not None and choice is None else None
        if parked is not None:
            self._end(parked, FinishReason.ABORT)
        else:
            self._scheduler.abort(request_id, choice)

    def flush_cache(self) -> bool:
        """Forget cached prefixes; False while requests run."""
        return not self._compiling and self._scheduler.flush_cache()

    def step(self) -> list[TokenDelta]:
        """Send one step and take in the one before.

        Raises:
            Exception: what the step raised, when the devices cannot even run an empty one any more.
        """
        self._take_compiled()
        if self._adapters is not None:
            self._adapters.work(wait_for_reading=self._scheduler.idle)
        try:
            plans = self._scheduler.schedule()
            forwarded = None if plans is None else self._runner.forward(plans)
            if self._pending is not None:
                pending, self._pending = self._pending, None
                self._scheduler.update(pending.result())
            if plans is not None and forwarded is not None:
                self._pending = forwarded.sample(self._constrained(plans))
        except Exception as error:
            self._recover(error)
        deltas, self._outbox = self._outbox + self._scheduler.take_deltas(), []
        if self._adapters is not None:
            for delta in deltas:
                self._adapters.release(delta)
        return deltas

    def _take_compiled(self) -> None:
        """Schedule requests whose grammars are ready; end those whose grammars are not."""
        if not self._compiling:
            return
        if self._scheduler.idle:
            # Nothing else to do meanwhile; short, because messages may come.
            wait([compiling.constraints for compiling in self._compiling.values()], _COMPILE_POLL_S)
        for request, constraints in list(self._compiling.values()):
            if not constraints.done():
                continue
            del self._compiling[request.id]
            error = constraints.exception()
            if error is None:
                self._enter(request, constraints.result())
            else:
                logger.warning("a grammar that was valid cannot be compiled: %s", error)
                self._end(request, FinishReason.ERROR, error=f"grammar: {error}", refused=True)

    def _enter(self, request: Request, constraints: Sequence[OutputConstraint] = ()) -> None:
        """Schedule a request, once its adapter is in memory."""
        if self._adapters is None or not request.adapter:
            self._scheduler.add(request, constraints)
            return

        def start(error: str | None) -> None:
            if error is None:
                self._scheduler.add(request, constraints)
            else:
                self._end(request, FinishReason.ERROR, error=error)

        self._adapters.enter(request, start)

    def _end(self, request: Request, reason: FinishReason, **fields: Any) -> None:
        self._outbox += [
            TokenDelta(request_id=request.id, choice=choice, finish_reason=reason, **fields)
            for choice in range(request.num_choices)
        ]

    def _constrained(self, plans: Plans) -> tuple[ConstrainedRows | None, ...]:
        return tuple(
            ConstrainedRows(tuple(rows), self._fill(list(rows.values()))) if rows else None
            for rows in self._scheduler.constrained_rows(plans)
        )

    def _fill(self, constraints: list[Any]) -> np.ndarray:
        assert self._grammars is not None
        return self._grammars.fill(constraints)

    def _recover(self, error: Exception) -> None:
        """The donated cache is gone with the step: rebuild it and compute the running sequences again."""
        logger.error("a step raised", exc_info=error)
        self._pending = None
        self._scheduler.requeue_after_failure()
        for _ in range(_MAX_RESETS):
            try:
                self._runner.reset()
            except Exception:
                logger.exception("the devices fail an empty step")
            else:
                return
        raise error


def _answer(reply: SendReply, key: str, error: str | None) -> None:
    reply(AdapterAnswer(key, error))
