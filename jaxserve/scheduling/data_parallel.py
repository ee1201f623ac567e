"""One scheduler per replica. Replicas run their steps together and share only the slots of LoRA adapters."""

from collections.abc import Sequence

from jaxserve.request import Request, TokenDelta
from jaxserve.scheduling.constraint import Constraint
from jaxserve.scheduling.scheduler import Scheduler, SchedulerStats
from jaxserve.step import Plans, StepOutput


class DataParallelScheduler:
    """The interface of `Scheduler` over `--dp-size` of them; a request stays with the replica it was assigned to.

    Args:
        schedulers: one per replica, in the order of the mesh's `data` axis.
    """

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        self._schedulers = tuple(schedulers)

    @property
    def idle(self) -> bool:
        """Whether no replica has anything to do."""
        return all(scheduler.idle for scheduler in self._schedulers)

    @property
    def stats(self) -> SchedulerStats:
        """Gauges and counters, summed over the replicas."""
        return SchedulerStats(*map(sum, zip(*(scheduler.stats for scheduler in self._schedulers), strict=True)))

    def add(self, request: Request, constraints: Sequence[Constraint] = ()) -> None:
        """Queue a request at the replica with the fewest live choices; ties go to the most cached prompt tokens."""
        least_live = min(scheduler.num_live for scheduler in self._schedulers)
        best = [scheduler for scheduler in self._schedulers if scheduler.num_live == least_live]
        if len(best) > 1:  # looking the prompt up in the prefix caches is only worth it to break a tie
            best.sort(key=lambda scheduler: -scheduler.num_cached_pages(request))
        best[0].add(request, constraints)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request or one choice of it; unknown ids are ignored."""
        for scheduler in self._schedulers:
            scheduler.abort(request_id, choice)

    def schedule(self) -> Plans | None:
        """Plan the next step of every replica; return None if no replica can run."""
        quarantined = next((scheduler for scheduler in self._schedulers if scheduler.quarantined), None)
        plans = tuple(
            scheduler.schedule() if quarantined is None or scheduler is quarantined else None
            for scheduler in self._schedulers
        )
        return plans if any(plan is not None for plan in plans) else None

    def update(self, outputs: Sequence[StepOutput | None]) -> None:
        """Process the results of the oldest step in flight, in the order of its plans."""
        for scheduler, output in zip(self._schedulers, outputs, strict=True):
            if output is not None:
                scheduler.update(output)

    def constrained_rows(self, plans: Plans) -> tuple[dict[int, Constraint], ...]:
        """See `Scheduler.constrained_rows`; returns one entry per plan of the newest step."""
        return tuple(
            {} if plan is None else scheduler.constrained_rows()
            for scheduler, plan in zip(self._schedulers, plans, strict=True)
        )

    def take_deltas(self) -> list[TokenDelta]:
        """Return the updates for clients since the last call."""
        return [delta for scheduler in self._schedulers for delta in scheduler.take_deltas()]

    def requeue_after_failure(self) -> None:
        """See `Scheduler.requeue_after_failure`; a step fails for all replicas together."""
        alone = sum(scheduler.num_in_flight for scheduler in self._schedulers) == 1
        for scheduler in self._schedulers:
            scheduler.requeue_after_failure(alone=alone)

    def flush_cache(self) -> bool:
        """Forget cached prefixes; do nothing and return False while anything runs or waits."""
        return self.idle and all(scheduler.flush_cache() for scheduler in self._schedulers)
