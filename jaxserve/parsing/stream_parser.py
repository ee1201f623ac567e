"""Base of the parsers of model output: text in, message deltas out, the same for any cutting of the text."""

from abc import ABC, abstractmethod

from jaxserve.parsing.deltas import Content, MessageDelta, Reasoning
from jaxserve.parsing.stream_reader import Parse, StreamReader

_SLICE = 1024


class StreamParser(ABC):
    """A parser of one output. `push` text as it comes, then `finish` once.

    A subclass writes `_parse`: it reads from `_reader` and appends to `_out`.

    Attributes:
        thinking: the text so far ends inside thinking.
    """

    def __init__(self) -> None:
        self._reader = StreamReader()
        self._out: list[MessageDelta] = []
        self._cut_off = False
        self.thinking = False
        self._reads: Parse[None] | None = None

    def push(self, text: str) -> list[MessageDelta]:
        """Pieces that are certain once this text is there."""
        out: list[MessageDelta] = []
        # Any cutting gives the same, and a short buffer is cheap to read from.
        for start in range(0, len(text), _SLICE):
            self._reader.text += text[start : start + _SLICE]
            out += self._run()
        return out

    def finish(self, *, cut_off: bool = False) -> list[MessageDelta]:
        """The rest.

        Args:
            cut_off: the output would have gone on; what is incomplete at its end is not wrong.
        """
        self._cut_off = cut_off
        self._reader.closed = True
        return self._run()

    @abstractmethod
    def _parse(self) -> Parse[None]: ...

    def _run(self) -> list[MessageDelta]:
        if self._reads is None:
            self._reads = self._parse()
        next(self._reads, None)
        out, self._out = self._out, []
        return out

    def _content(self, text: str) -> None:
        if text:
            self._out.append(Content(text))

    def _reasoning(self, text: str) -> None:
        if text:
            self._out.append(Reasoning(text))
