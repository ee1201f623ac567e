"""Host 0's side: tells the other hosts what it runs itself, and compares what they drew."""

import logging
import os
import threading
import zlib
from collections.abc import Sequence

import numpy as np

from jaxserve.distributed.messages import Channel, ConstrainedBits, Draw, Drawn, Finish, Forward, Reset, encode
from jaxserve.engine import Forwarded, Pending, Runner
from jaxserve.errors import ExitCode
from jaxserve.step import ConstrainedRows, Plans, StepOutput

logger = logging.getLogger(__name__)


def digest_of(outputs: tuple[StepOutput | None, ...]) -> int:
    """CRC-32 of the tokens of a step."""
    digest = 0
    for output in outputs:
        if output is not None:
            digest = zlib.crc32(np.ascontiguousarray(output.token_ids_B, np.int32).tobytes(), digest)
    return digest


class Followers:
    """The other hosts. One that is lost, or draws other tokens than this one, ends the process.

    Args:
        channels: by rank, from 1; listened to from now on.
    """

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._channels = channels
        self._lock = threading.Lock()
        # Of steps that not every host has reported yet: the digest that came first, and how many came.
        self._digests: dict[int, tuple[int, int]] = {}
        self._finished = False
        for rank, channel in enumerate(channels, 1):
            threading.Thread(target=self._listen, args=(rank, channel), name=f"host-{rank}", daemon=True).start()

    def tell(self, message: object) -> None:
        """Send a message to all."""
        data = encode(message)
        try:
            for channel in self._channels:
                channel.send_encoded(data)
        except OSError as error:
            _give_up(f"a host is lost: {error}")

    def compare(self, step: int, digest: int, rank: int = 0) -> None:
        """Note what a host drew; all must have drawn the same."""
        with self._lock:
            first, count = self._digests.pop(step, (digest, 0))
            if count < len(self._channels):
                self._digests[step] = first, count + 1
        if digest != first:
            _give_up(f"host {rank} drew other tokens than the others in step {step}")

    def forget_steps(self) -> None:
        """Steps that raised are reported by nobody."""
        with self._lock:
            self._digests.clear()

    def finish(self) -> None:
        """Let them go."""
        self._finished = True
        self.tell(Finish())

    def _listen(self, rank: int, channel: Channel) -> None:
        try:
            while True:
                match channel.receive_from_follower():
                    case Drawn(step=step, digest=digest):
                        self.compare(step, digest, rank)
                    case other:
                        _give_up(f"host {rank} sent an unexpected {type(other).__name__}")
        except OSError as error:
            if not self._finished:
                _give_up(f"host {rank} is lost: {error}")


class LeadingRunner:
    """A `Runner` whose every call the other hosts repeat.

    Args:
        runner: of this host.
        followers: the other hosts.
    """

    def __init__(self, runner: Runner, followers: Followers) -> None:
        self._runner = runner
        self._followers = followers
        self._step = 0

    def forward(self, plans: Plans) -> Forwarded:
        """See `Runner`."""
        self._followers.tell(Forward(plans))
        return _Forwarded(self, self._runner.forward(plans))

    def reset(self) -> None:
        """See `Runner`."""
        self._followers.forget_steps()
        self._followers.tell(Reset())
        self._runner.reset()

    def draw(self, forwarded: Forwarded, constrained: Sequence[ConstrainedRows | None]) -> Pending:
        """Send the draws of a forwarded step."""
        bits = tuple(
            None if rows is None else ConstrainedBits(rows.rows, np.ascontiguousarray(rows.bits_CW).tobytes())
            for rows in constrained
        )
        step, self._step = self._step, self._step + 1
        self._followers.tell(Draw(step, bits))
        return _Pending(self._followers, step, forwarded.draw(constrained))


class _Forwarded:
    def __init__(self, leader: LeadingRunner, forwarded: Forwarded) -> None:
        self._leader = leader
        self._forwarded = forwarded

    def draw(self, constrained: Sequence[ConstrainedRows | None]) -> Pending:
        return self._leader.draw(self._forwarded, constrained)


class _Pending:
    def __init__(self, followers: Followers, step: int, pending: Pending) -> None:
        self._followers = followers
        self._step = step
        self._pending = pending

    def result(self) -> tuple[StepOutput | None, ...]:
        outputs = self._pending.result()
        self._followers.compare(self._step, digest_of(outputs))
        return outputs


def _give_up(reason: str) -> None:
    """End the process: a step in flight waits for a host that will never come, and nothing can wake it."""
    logger.error("%s: the engine ends", reason)
    logging.shutdown()
    os._exit(int(ExitCode.ENGINE_LOST))
