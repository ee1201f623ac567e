"""Every other host: runs what host 0 says, step for step."""

import logging
import os
import queue
import threading

from jaxserve.distributed.leader import digest_of
from jaxserve.distributed.messages import Channel, Draw, Drawn, Finish, Forward, FromLeader, Reset
from jaxserve.engine import Forwarded, Pending, Runner
from jaxserve.errors import ExitCode
from jaxserve.step import ConstrainedRows

logger = logging.getLogger(__name__)


class Leader:
    """Host 0, as seen from here. When it is lost the process ends: a step in flight waits for it and cannot be woken.

    Args:
        channel: to it; listened to from now on.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._inbox: queue.SimpleQueue[FromLeader] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="host-0", daemon=True).start()

    @property
    def silent(self) -> bool:
        """Whether nothing waits."""
        return self._inbox.empty()

    def receive(self) -> FromLeader:
        """Wait for a message."""
        return self._inbox.get()

    def report(self, message: Drawn) -> None:
        """Tell what was drawn."""
        self._channel.send(message)

    def _listen(self) -> None:
        try:
            while True:
                message = self._channel.receive_from_leader()
                self._inbox.put(message)
                if isinstance(message, Finish):
                    return
        except OSError as error:
            logger.error("host 0 is lost: %s", error)
            logging.shutdown()
            os._exit(int(ExitCode.ENGINE_LOST))


class Follower:
    """A runner that repeats host 0's calls.

    Args:
        runner: of this host.
        leader: host 0.
    """

    def __init__(self, runner: Runner, leader: Leader) -> None:
        self._runner = runner
        self._leader = leader
        self._forwarded: Forwarded | None = None
        self._pending: tuple[int, Pending] | None = None

    def run(self) -> None:
        """Repeat until host 0 says that it is over.

        Raises:
            Exception: what a step raised, if host 0 does not start over.
        """
        failure: Exception | None = None
        while not isinstance(message := self._leader.receive(), Finish):
            if failure is not None and not isinstance(message, Reset):
                raise failure
            try:
                self._handle(message)
                failure = None
            except Exception as error:
                # Host 0 will have seen the same, and starts over.
                logger.exception("a step raised")
                failure = error

    def _handle(self, message: FromLeader) -> None:
        match message:
            case Forward(plans=plans):
                self._forwarded = self._runner.forward(plans)
                self._report()
            case Draw(step=step, constrained=constrained):
                assert self._forwarded is not None
                rows = [None if bits is None else ConstrainedRows(bits.rows, bits.bits_CW()) for bits in constrained]
                self._pending = step, self._forwarded.draw(rows)
                if self._leader.silent:
                    self._report()
            case Reset():
                self._pending = None
                self._runner.reset()
            case other:
                raise RuntimeError(f"host 0 sent an unexpected {type(other).__name__}")

    def _report(self) -> None:
        """Tell the tokens of the step before; where there is a next one it was sent first, so no device waits."""
        if self._pending is not None:
            (step, pending), self._pending = self._pending, None
            self._leader.report(Drawn(step, digest_of(pending.result())))
