"""Text that arrives in pieces, read as if all of it were there.

A parser is a generator: it reads with the methods below through `yield from`, and yields whenever it needs text that
has not come yet. So it is written like a parser of a whole text, and gives the same result for any cutting.
"""

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias, TypeVar

from jaxserve.parsing.json_scanner import JsonScanner

T = TypeVar("T")

# Yields to wait for more text; returns a T.
Parse: TypeAlias = Generator[None, None, T]
Emit: TypeAlias = Callable[[str], None]

_SPACE = re.compile(r"\s*")


class StreamReader:
    """A buffer of unread text.

    Attributes:
        text: what has come and is not read yet.
        closed: nothing more will come.
    """

    def __init__(self) -> None:
        self.text = ""
        self.closed = False
        self._recorded: list[str] | None = None

    def record(self, before: str = "") -> None:
        """Remember what is read from now on, after something that was read just before."""
        self._recorded = [before]

    def recorded(self) -> str:
        """What was read since `record`."""
        return "".join(self._recorded or ())

    def take(self, count: int) -> str:
        """Read so many characters of what is there."""
        taken, self.text = self.text[:count], self.text[count:]
        if self._recorded is not None:
            self._recorded.append(taken)
        return taken

    def until(self, markers: Sequence[str], emit: Emit) -> Parse[str | None]:
        """Read up to and past the first of the markers, emitting what is before it.

        Holds back only the longest tail that could still become a marker. Returns the marker, or None at the end of
        the text.
        """
        while True:
            found = min(
                ((start, marker) for marker in markers if (start := self.text.find(marker)) >= 0),
                key=lambda item: item[0],
                default=None,
            )
            open_start = len(self.text) - self._open_tail(markers)
            # A marker that starts earlier may still be completed.
            if found is not None and (self.closed or found[0] <= open_start):
                start, marker = found
                emit(self.take(start))
                self.take(len(marker))
                return marker
            if self.closed:
                emit(self.take(len(self.text)))
                return None
            emit(self.take(open_start))
            yield

    def rest(self, emit: Emit) -> Parse[None]:
        """Read all there is to come."""
        yield from self.until((), emit)

    def accept(self, *literals: str) -> Parse[str | None]:
        """Read one of the literals if it comes next."""
        while True:
            for literal in literals:
                if self.text.startswith(literal):
                    return self.take(len(literal))
            if self.closed or not any(literal.startswith(self.text) for literal in literals):
                return None
            yield

    def space(self) -> Parse[str]:
        """Read white space, if any; afterwards the next character is there, or the text has ended."""
        spaces = ""
        while True:
            match = _SPACE.match(self.text)
            assert match is not None
            spaces += self.take(match.end())
            if self.text or self.closed:
                return spaces
            yield

    def peek(self) -> Parse[str]:
        """The next character, unread; empty at the end."""
        while not self.text and not self.closed:
            yield
        return self.text[:1]

    def json(self, emit: Emit) -> Parse[bool]:
        """Read one JSON value, emitting it as strict JSON while it comes; False where it stops being one."""
        scanner = JsonScanner()
        while True:
            out, count = scanner.scan(self.text, closed=self.closed)
            self.take(count)
            if out:
                emit(out)
            if scanner.done or scanner.failed or self.closed:
                return scanner.done
            yield

    def _open_tail(self, markers: Sequence[str]) -> int:
        """Length of the longest tail of the text that is a proper beginning of a marker."""
        longest = 0
        for marker in markers:
            for size in range(min(len(marker) - 1, len(self.text)), longest, -1):
                if self.text.endswith(marker[:size]):
                    longest = size
                    break
        return longest
