"""The side of every host but host 0: repeats host 0's calls, step by step."""

import logging
import queue
import threading
from typing import TypeAlias

from jaxserve.distributed.adapters import AdapterReceiver
from jaxserve.distributed.disconnect import GiveUp, end_process
from jaxserve.distributed.leader import digest_of
from jaxserve.distributed.messages import (
    AdapterBytes,
    AddAdapter,
    Channel,
    Failed,
    Finish,
    Forward,
    FromLeader,
    MinOverHosts,
    RemoveAdapter,
    Reset,
    Sample,
    Sampled,
)
from jaxserve.runner_protocol import Forwarded, Pending, Runner
from jaxserve.step import ConstrainedRows

logger = logging.getLogger(__name__)

_Reports: TypeAlias = queue.SimpleQueue[tuple[int, Pending] | None]


class Leader:
    """A follower's connection to host 0. When it is lost, the process ends.

    Args:
        channel: channel to host 0; a thread starts to listen to it.
        give_up: ends the process; called with the reason.
    """

    def __init__(self, channel: Channel, give_up: GiveUp = end_process) -> None:
        self._channel = channel
        self._give_up = give_up
        self._finished = False
        self._inbox: queue.SimpleQueue[FromLeader] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="host-0", daemon=True).start()

    def receive(self) -> FromLeader:
        """Wait for a message."""
        return self._inbox.get()

    def min_over_hosts(self, value: int) -> int:
        """See `Followers.min_over_hosts`; call before the first step only."""
        self.report(MinOverHosts(value))
        answer = self.receive()
        if not isinstance(answer, MinOverHosts):
            raise RuntimeError(f"host 0 sent an unexpected {type(answer).__name__}")
        return answer.value

    def report(self, message: MinOverHosts | Sampled | Failed) -> None:
        """Send host 0 a value for `min_over_hosts`, or the result of a step."""
        try:
            self._channel.send(message)
        except OSError as error:
            if not self._finished:  # else host 0 does not wait for it
                self._give_up(f"host 0 is lost: {error}")

    def _listen(self) -> None:
        try:
            while True:
                message = self._channel.receive_from_leader()
                self._finished = isinstance(message, Finish)
                self._inbox.put(message)
                if self._finished:
                    return
        except OSError as error:
            self._give_up(f"host 0 is lost: {error}")


class Follower:
    """A runner that repeats host 0's calls.

    A separate thread waits for tokens, so the next step is sent while this one runs, as on host 0.

    Args:
        runner: the runner of this host.
        leader: host 0.
    """

    def __init__(self, runner: Runner, leader: Leader) -> None:
        self._runner = runner
        self._leader = leader
        self._step = 0
        self._forwarded: Forwarded | None = None
        self._adapters = AdapterReceiver()
        self._reports: _Reports = queue.SimpleQueue()

    def run(self) -> None:
        """Repeat host 0's calls until it sends `Finish`."""
        reporter = threading.Thread(target=self._report, name="reporter", daemon=True)
        reporter.start()
        failed = False
        while not isinstance(message := self._leader.receive(), Finish):
            if failed and isinstance(message, Forward | Sample):
                continue  # host 0 sent it before it noticed the failure
            try:
                self._handle(message)
                failed = failed and not isinstance(message, Reset)
            except Exception as error:
                failed = True
                self._fail(self._step, error)
        self._reports.put(None)
        reporter.join()

    def _handle(self, message: FromLeader) -> None:
        match message:
            case Forward(step=step, plans=plans):
                self._step, self._forwarded = step, None
                self._forwarded = self._runner.forward(plans)
            case Sample(constrained=constrained):
                assert self._forwarded is not None
                rows = [None if bits is None else ConstrainedRows(bits.rows, bits.bits_CW()) for bits in constrained]
                self._reports.put((self._step, self._forwarded.sample(rows)))
            case AdapterBytes(data=data):
                self._adapters.take(data)
            case AddAdapter(key=key):
                self._runner.add_adapter(key, self._adapters.finish(message))
            case RemoveAdapter(key=key):
                self._runner.remove_adapter(key)
            case Reset(step=step):
                self._step = step
                self._runner.reset()
            case other:
                raise RuntimeError(f"host 0 sent an unexpected {type(other).__name__}")

    def _report(self) -> None:
        while (report := self._reports.get()) is not None:
            step, pending = report
            try:
                digest = digest_of(pending.result())
            except Exception as error:
                self._fail(step, error)
            else:
                self._leader.report(Sampled(step, digest))

    def _fail(self, step: int, error: Exception) -> None:
        """Report a failure to host 0, which resets all hosts if the step raised there, too; otherwise it gives up."""
        logger.error("step %d raised", step, exc_info=error)
        self._leader.report(Failed(step, f"{type(error).__name__}: {error}"))
