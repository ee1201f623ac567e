"""Host 0's side: sends its calls to the other hosts, and compares the tokens that they sampled."""

import contextlib
import logging
import threading
import zlib
from collections.abc import Generator, Sequence

import numpy as np

from jaxserve.distributed.adapters import adapter_messages
from jaxserve.distributed.disconnect import GiveUp, end_process
from jaxserve.distributed.messages import (
    Channel,
    ConstrainedBits,
    Failed,
    Finish,
    Forward,
    MinOverHosts,
    RemoveAdapter,
    Reset,
    Sample,
    Sampled,
    encode,
)
from jaxserve.runner_protocol import Forwarded, LoadedAdapter, Pending, Runner
from jaxserve.step import ConstrainedRows, Plans, StepOutput

logger = logging.getLogger(__name__)

# If a step raises on every host, host 0 resets them. It may notice the failure this much later than another host.
_NOTICE_S = 3.0
# Time limit of a reset, which never ends if a host waits in a collective of a program that this host has not sent.
_RESET_S = 30.0


def digest_of(outputs: tuple[StepOutput | None, ...]) -> int:
    """Return the CRC-32 of the tokens of a step."""
    digest = 0
    for output in outputs:
        if output is not None:
            digest = zlib.crc32(np.ascontiguousarray(output.token_ids_B, np.int32).tobytes(), digest)
    return digest


class Followers:
    """Host 0's connections to the other hosts. If one is lost, samples other tokens or fails alone, the process ends.

    Args:
        channels: channels to the other hosts, by rank from 1; a thread starts to listen to each.
        give_up: ends the process; called with the reason.
    """

    def __init__(self, channels: Sequence[Channel], give_up: GiveUp = end_process) -> None:
        self._channels = channels
        self._give_up = give_up
        self._changed = threading.Condition()
        # For steps that not every host has reported yet: the first digest, and the number of digests.
        self._digests: dict[int, tuple[int, int]] = {}
        # Values of the hosts that wait in `min_over_hosts`.
        self._minima: list[int] = []
        # The step of the last reset; messages about earlier steps are ignored.
        self._last_reset = -1
        self._finished = False
        for rank, channel in enumerate(channels, 1):
            threading.Thread(target=self._listen, args=(rank, channel), name=f"host-{rank}", daemon=True).start()

    def broadcast(self, message: object) -> None:
        """Send a message to all followers."""
        data = encode(message)
        try:
            for channel in self._channels:
                channel.send_encoded(data)
        except OSError as error:
            self._give_up(f"a host is lost: {error}")

    def min_over_hosts(self, value: int) -> int:
        """Wait until every host has made the same call, and return the smallest of their values."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._minima) == len(self._channels))
            least = min(value, *self._minima)
            self._minima.clear()
        self.broadcast(MinOverHosts(least))
        return least

    def compare(self, step: int, digest: int, rank: int = 0) -> None:
        """Compare the digest of a host's sampled tokens with those of the others; give up if they differ."""
        with self._changed:
            if step <= self._last_reset:
                return
            first, count = self._digests.pop(step, (digest, 0))
            if count < len(self._channels):
                self._digests[step] = first, count + 1
        if digest != first:
            self._give_up(f"host {rank} sampled different tokens in step {step}")

    def reset(self, step: int) -> None:
        """Reset all hosts; their messages about earlier steps are ignored."""
        with self._changed:
            self._digests.clear()
            self._last_reset = step
            self._changed.notify_all()
        self.broadcast(Reset(step))

    @contextlib.contextmanager
    def deadline(self) -> Generator[None, None, None]:
        """Call `give_up` unless the block ends within `_RESET_S`."""
        timer = threading.Timer(
            _RESET_S, self._give_up, ["the hosts did not complete a reset in time after a step raised"]
        )
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def finish(self) -> None:
        """Tell the followers to exit."""
        self._finished = True
        self.broadcast(Finish())

    def _listen(self, rank: int, channel: Channel) -> None:
        try:
            while True:
                match channel.receive_from_follower():
                    case Sampled(step=step, digest=digest):
                        self.compare(step, digest, rank)
                    case MinOverHosts(value=value):
                        self._note_barrier(value)
                    case Failed(step=step, reason=reason):
                        self._await_reset(rank, step, reason)
                    case other:
                        self._give_up(f"host {rank} sent an unexpected {type(other).__name__}")
        except OSError as error:
            if not self._finished:
                self._give_up(f"host {rank} is lost: {error}")

    def _note_barrier(self, value: int) -> None:
        with self._changed:
            self._minima.append(value)
            self._changed.notify_all()

    def _await_reset(self, rank: int, step: int, reason: str) -> None:
        """Give up unless this host resets soon after a step raised on another one, for which it would wait forever."""
        with self._changed:
            over = self._changed.wait_for(lambda: step < self._last_reset, _NOTICE_S)
        if not over:
            self._give_up(f"host {rank} failed in step {step}: {reason}")


class LeadingRunner:
    """A `Runner` whose calls are repeated by the other hosts.

    Args:
        runner: the runner of this host.
        followers: the other hosts.
    """

    def __init__(self, runner: Runner, followers: Followers) -> None:
        self._runner = runner
        self._followers = followers
        self._step = 0

    def forward(self, plans: Plans) -> Forwarded:
        """See `Runner`."""
        step = self._next_step()
        self._followers.broadcast(Forward(step, plans))
        return _Forwarded(self._followers, step, self._runner.forward(plans))

    def add_adapter(self, key: str, adapter: LoadedAdapter) -> None:
        """See `Runner`. The other hosts are sent the adapter itself, so only this host needs its files."""
        for message in adapter_messages(key, adapter):
            self._followers.broadcast(message)
        self._runner.add_adapter(key, adapter)

    def remove_adapter(self, key: str) -> None:
        """See `Runner`."""
        self._followers.broadcast(RemoveAdapter(key))
        self._runner.remove_adapter(key)

    def reset(self) -> None:
        """See `Runner`."""
        self._followers.reset(self._next_step())
        with self._followers.deadline():
            self._runner.reset()

    def _next_step(self) -> int:
        step, self._step = self._step, self._step + 1
        return step


class _Forwarded:
    def __init__(self, followers: Followers, step: int, forwarded: Forwarded) -> None:
        self._followers = followers
        self._step = step
        self._forwarded = forwarded

    def sample(self, constrained: Sequence[ConstrainedRows | None]) -> Pending:
        bits = tuple(
            None if rows is None else ConstrainedBits(rows.rows, np.ascontiguousarray(rows.bits_CW).tobytes())
            for rows in constrained
        )
        self._followers.broadcast(Sample(bits))
        return _Pending(self._followers, self._step, self._forwarded.sample(constrained))


class _Pending:
    def __init__(self, followers: Followers, step: int, pending: Pending) -> None:
        self._followers = followers
        self._step = step
        self._pending = pending

    def result(self) -> tuple[StepOutput | None, ...]:
        outputs = self._pending.result()
        self._followers.compare(self._step, digest_of(outputs))
        return outputs
