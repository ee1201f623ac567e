"""Runs the child processes of a check, and goes on behind a task that ended one or never ended."""

import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import msgspec

from jaxserve.device_check.events import Begin, Event, Outcome, Status

# A child has to start JAX, and to compile a model's step.
_START_TIMEOUT_S = 300.0
_DETAIL_CHARS = 600

# Makes the command of a child, given the number of the first task to do.
Command = Callable[[int], Sequence[str]]


class ChildFailedError(RuntimeError):
    """A child ended before it began a task."""


def run_children(command: Command, timeout_s: float) -> Iterator[Event]:
    """Yield the events of a phase; a task that crashes or takes too long becomes a failed `Outcome`.

    Raises:
        ChildFailedError: a child ended before it began a task.
    """
    first = 0
    while True:
        begun: Begin | None = None
        reported = False
        with tempfile.TemporaryFile() as errors:
            child = _Child(command(first), errors)
            status: Status | None = None
            while status is None:
                limit = _START_TIMEOUT_S if begun is None else timeout_s
                event = child.next_event(limit)
                if isinstance(event, Begin):
                    begun, reported = event, False
                reported |= isinstance(event, Outcome)
                if event is not None:
                    yield event
                elif child.ended:
                    status = "passed" if child.returncode == 0 else "crashed"
                else:
                    status = "timed out"
            child.kill()
            if status == "passed":
                return
            detail = _last_lines(errors)
        if begun is None:
            raise ChildFailedError(f"the child process {status} before its first task: {detail}")
        first = begun.index + 1
        if reported:  # what ended the child came after the task
            continue
        if status == "timed out":
            detail = f"no result after {timeout_s:.0f} s"
        elif child.returncode < 0:
            detail = f"ended by signal {-child.returncode}: {detail}"
        model, _, rest = begun.label.partition(": ")
        op, _, name = rest.partition(", ")
        yield Outcome(model=model, op=op, name=name, status=status, detail=detail)


class _Child:
    """A child process whose events can be waited for with a time limit."""

    def __init__(self, command: Sequence[str], errors: IO[bytes]) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ended = False

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    @property
    def returncode(self) -> int:
        """The exit status; negative for a signal."""
        return self._process.wait()

    def next_event(self, timeout_s: float) -> Event | None:
        """Return the next event; None if the child ended, or if there was none for too long."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if line is None:
            self.ended = True
            return None
        return msgspec.json.decode(line, type=Event)

    def kill(self) -> None:
        """End the process, if it has not ended."""
        self._process.kill()
        self._process.wait()
        self._reader.join()


def _last_lines(errors: IO[bytes]) -> str:
    errors.seek(0)
    return errors.read().decode(errors="replace").strip()[-_DETAIL_CHARS:]


def worker_command(argv: Sequence[str], phase: str) -> Command:
    """Return the command of the children of a phase."""
    module = [sys.executable, "-m", "jaxserve.device_check.worker", *argv, "--phase", phase]
    return lambda first: [*module, "--first", str(first)]
