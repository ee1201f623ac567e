"""The step loop: schedule, dispatch, take in the step before. Runs on one thread and knows no transport.

Step n + 1 is scheduled and sent before the tokens of step n reach the host, so the host works while the device
does.
"""

import logging
from collections import deque
from typing import Protocol

from jaxserve.request import Request, TokenDelta
from jaxserve.scheduling.data_parallel import DataParallelScheduler
from jaxserve.scheduling.scheduler import SchedulerStats
from jaxserve.step import Plans, StepOutput

logger = logging.getLogger(__name__)

# After a step that raised, its sequences are computed anew; the scheduler ends those that make steps raise. So many
# failures in a row are the machine's fault, and the engine gives up.
_MAX_FAILURES = 5
_MAX_PENDING = 1


class Pending(Protocol):
    """A step on its way."""

    def result(self) -> tuple[StepOutput | None, ...]:
        """Wait for it; one output per plan."""
        ...


class Runner(Protocol):
    """What the engine needs of a model runner."""

    def dispatch(self, plans: Plans) -> Pending:
        """Send a step to the devices; at least one of the plans is not None."""
        ...

    def reset(self) -> None:
        """Make the cache anew after a step raised."""
        ...


class Engine:
    """Requests in, token deltas out."""

    def __init__(self, runner: Runner, scheduler: DataParallelScheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._pending: deque[Pending] = deque()
        self._num_failures = 0

    @property
    def idle(self) -> bool:
        """Whether `step` would do nothing."""
        return self._scheduler.idle

    @property
    def stats(self) -> SchedulerStats:
        """Gauges and counters."""
        return self._scheduler.stats

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._scheduler.add(request)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice of it."""
        self._scheduler.abort(request_id, choice)

    def flush_cache(self) -> bool:
        """Forget cached prefixes; False while requests run."""
        return self._scheduler.flush_cache()

    def step(self) -> list[TokenDelta]:
        """Send one step and take in the one before.

        Raises:
            Exception: what the step raised, after `_MAX_FAILURES` failures in a row.
        """
        try:
            plans = self._scheduler.schedule()
            if plans is not None:
                self._pending.append(self._runner.dispatch(plans))
            if self._pending and (plans is None or len(self._pending) > _MAX_PENDING):
                self._scheduler.update(self._pending.popleft().result())
                self._num_failures = 0
        except Exception as error:
            self._recover(error)
        return self._scheduler.take_deltas()

    def _recover(self, error: Exception) -> None:
        """The donated cache is gone with the step: rebuild it and compute the running sequences again."""
        self._num_failures += 1
        logger.exception("step failed (%d in a row)", self._num_failures)
        if self._num_failures >= _MAX_FAILURES:
            raise error
        self._pending.clear()
        self._runner.reset()
        self._scheduler.restart_running()
