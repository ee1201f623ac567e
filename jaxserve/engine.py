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

# Times that an empty step is tried after one raised, before the engine gives the devices up.
_MAX_RESETS = 3
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
        """Make the cache anew after a step raised, and run an empty step; raises what that raises."""
        ...


class Engine:
    """Requests in, token deltas out."""

    def __init__(self, runner: Runner, scheduler: DataParallelScheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._pending: deque[Pending] = deque()

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
            Exception: what the step raised, when the devices cannot even run an empty one any more.
        """
        try:
            plans = self._scheduler.schedule()
            if plans is not None:
                self._pending.append(self._runner.dispatch(plans))
            if self._pending and (plans is None or len(self._pending) > _MAX_PENDING):
                self._scheduler.update(self._pending.popleft().result())
        except Exception as error:
            self._recover(error)
        return self._scheduler.take_deltas()

    def _recover(self, error: Exception) -> None:
        """The donated cache is gone with the step: rebuild it and compute the running sequences again."""
        logger.error("a step raised", exc_info=error)
        self._pending.clear()
        self._scheduler.restart_running()
        for _ in range(_MAX_RESETS):
            try:
                self._runner.reset()
            except Exception:
                logger.exception("the devices fail an empty step")
            else:
                return
        raise error
