"""Reads streamed text as if all of it had already arrived.

A parser is a generator: it reads with the methods below through `yield from`, and yields whenever it needs text that
has not arrived yet. It is written like a parser of a complete text, and its result does not depend on the chunks.
"""

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias, TypeVar

from jaxserve.parsing.json_scanner import JsonScanner

T = TypeVar("T")

# A generator that yields whenever it waits for more text, and returns a T.
Parse: TypeAlias = Generator[None, None, T]
Emit: TypeAlias = Callable[[str], None]

_SPACE = re.compile(r"\s*")


class StreamReader:
    """A buffer of unread text.

    Attributes:
        text: text that has arrived and is not read yet.
        closed: whether the input has ended.
    """

    def __init__(self) -> None:
        self.text = ""
        self.closed = False
        self._recorded: list[str] | None = None

    def record(self, before: str = "") -> None:
        """Start recording the text that is read; `before` is put in front of it."""
        self._recorded = [before]

    def recorded(self) -> str:
        """Return the text recorded since `record`."""
        return "".join(self._recorded or ())

    def take(self, count: int) -> str:
        """Read `count` characters of the buffered text."""
        taken, self.text = self.text[:count], self.text[count:]
        if self._recorded is not None:
            self._recorded.append(taken)
        return taken

    def until(self, markers: Sequence[str], emit: Emit) -> Parse[str | None]:
        """Read past the first occurrence of a marker, emitting the text before it.

        Holds back only the longest suffix that could still become a marker. Returns the marker, or None at the end of
        the input.
        """
        while True:
            found = min(
                ((start, marker) for marker in markers if (start := self.text.find(marker)) >= 0),
                key=lambda item: item[0],
                default=None,
            )
            open_start = len(self.text) - self._open_tail(markers)
            # An incomplete marker that starts earlier takes precedence once it is complete.
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
        """Read and emit the rest of the input."""
        yield from self.until((), emit)

    def accept(self, *literals: str) -> Parse[str | None]:
        """Read and return one of the literals if it comes next; return None otherwise."""
        while True:
            for literal in literals:
                if self.text.startswith(literal):
                    return self.take(len(literal))
            if self.closed or not any(literal.startswith(self.text) for literal in literals):
                return None
            yield

    def space(self) -> Parse[str]:
        """Read and return white space, until another character is buffered or the input has ended."""
        spaces = ""
        while True:
            match = _SPACE.match(self.text)
            assert match is not None
            spaces += self.take(match.end())
            if self.text or self.closed:
                return spaces
            yield

    def peek(self) -> Parse[str]:
        """Return the next character without reading it; empty at the end of the input."""
        while not self.text and not self.closed:
            yield
        return self.text[:1]

    def json(self, emit: Emit) -> Parse[bool]:
        """Read one JSON value, emitting strict JSON as it arrives; return False if it is invalid or incomplete."""
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
        """Return the length of the longest suffix of the text that is a proper prefix of a marker."""
        longest = 0
        for marker in markers:
            for size in range(min(len(marker) - 1, len(self.text)), longest, -1):
                if self.text.endswith(marker[:size]):
                    longest = size
                    break
        return longest
