"""The step loop: schedule, launch the forward pass, process the previous step, launch sampling.

The loop runs on one thread and is independent of the transport.

The forward pass of step n + 1 is sent before the tokens of step n reach the host, so host and device work in parallel;
the token masks of step n + 1 are sent once the tokens of step n are known.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

from jaxserve.engine.admission import Admission, Admitted
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
from jaxserve.lora.store import AdapterStore, OnDone
from jaxserve.request import AdapterSource, GrammarTokenizer, Request, TokenDelta
from jaxserve.runner_protocol import Pending, Runner
from jaxserve.scheduling.data_parallel import DataParallelScheduler
from jaxserve.scheduling.scheduler import SchedulerStats
from jaxserve.step import ConstrainedRows, Plans

logger = logging.getLogger(__name__)

# Number of attempts at an empty step after a step raised, before the engine fails.
_MAX_RESETS = 3

# Sends the reply to a message.
SendReply: TypeAlias = Callable[[Reply], None]


class Engine:
    """Runs requests in steps and returns their token deltas.

    Args:
        runner: the runner of the model.
        scheduler: decides what the runner runs.
        vocab_size: vocabulary size of the model.
        adapters: LoRA adapters that requests may use; None without LoRA.
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
        self._adapters = adapters
        self._admission = Admission(vocab_size, adapters)
        self._pending: Pending | None = None

    @property
    def idle(self) -> bool:
        """Whether `step` would do nothing."""
        return self._scheduler.idle and self._admission.idle

    @property
    def stats(self) -> SchedulerStats:
        """Gauges and counters."""
        stats = self._scheduler.stats
        return stats._replace(num_waiting=stats.num_waiting + self._admission.num_waiting)

    def handle(self, message: ToEngine, reply: SendReply) -> bool:
        """Process a message; return False if it is `Shutdown`.

        Args:
            message: a message from the API process.
            reply: sends the reply; called immediately or, for adapters, in a later step.
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
        """Accept constrained requests from now on."""
        self._admission.use_tokenizer(tokenizer)

    def load_adapter(self, source: AdapterSource, on_done: OnDone) -> None:
        """Load a LoRA adapter while requests run; `on_done` is called in a later step with an error, or None."""
        if self._adapters is None:
            on_done("the engine runs without LoRA")
        else:
            self._adapters.load(source, on_done)

    def unload_adapter(self, key: str, on_done: OnDone) -> None:
        """Refuse new requests with an adapter, and unload it after the last one; `on_done` is called then."""
        if self._adapters is None:
            on_done("the engine runs without LoRA")
        else:
            self._adapters.unload(key, on_done)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RuntimeError: the request is constrained, and `use_tokenizer` was not called.
        """
        self._schedule(self._admission.add(request))

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice of it."""
        if not self._admission.abort(request_id, choice):
            self._scheduler.abort(request_id, choice)

    def flush_cache(self) -> bool:
        """Forget cached prefixes; do nothing and return False while requests run."""
        return not self._admission.num_waiting and self._scheduler.flush_cache()

    def step(self) -> list[TokenDelta]:
        """Send the next step, process the results of the previous one, and return the new deltas.

        Raises:
            Exception: the step's exception, if the devices then fail empty steps as well.
        """
        self._schedule(self._admission.work(device_idle=self._scheduler.idle))
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
        deltas = self._admission.take_deltas() + self._scheduler.take_deltas()
        self._admission.release(deltas)
        return deltas

    def _schedule(self, admitted: Iterable[Admitted]) -> None:
        for request, constraints in admitted:
            self._scheduler.add(request, constraints)

    def _constrained(self, plans: Plans) -> tuple[ConstrainedRows | None, ...]:
        return tuple(
            ConstrainedRows(tuple(rows), self._admission.fill_masks(list(rows.values()))) if rows else None
            for rows in self._scheduler.constrained_rows(plans)
        )

    def _recover(self, error: Exception) -> None:
        """Rebuild the cache, which was donated to the failed step, and requeue the running sequences."""
        logger.error("a step raised", exc_info=error)
        self._pending = None
        self._scheduler.requeue_after_failure()
        for _ in range(_MAX_RESETS):
            try:
                self._runner.reset()
            except Exception:
                logger.exception("the devices failed an empty step")
            else:
                return
        raise error


def _answer(reply: SendReply, key: str, error: str | None) -> None:
    reply(AdapterAnswer(key, error))
