"""Base class of the parsers of model output: text in, message deltas out, independent of how the text is chunked."""

from abc import ABC, abstractmethod

from jaxserve.parsing.deltas import Content, MessageDelta, Reasoning
from jaxserve.parsing.stream_reader import Parse, StreamReader

_SLICE = 1024


class StreamParser(ABC):
    """Parser of one output: call `push` for each chunk of text, then `finish` once.

    A subclass implements `_parse`, which reads from `_reader` and appends to `_out`.

    Attributes:
        thinking: whether the text so far ends inside thinking.
    """

    def __init__(self) -> None:
        self._reader = StreamReader()
        self._out: list[MessageDelta] = []
        self._cut_off = False
        self.thinking = False
        self._reads: Parse[None] | None = None

    def push(self, text: str) -> list[MessageDelta]:
        """Add text and return the deltas that are now certain."""
        out: list[MessageDelta] = []
        # The slices do not change the result, and a short buffer is cheap to read from.
        for start in range(0, len(text), _SLICE):
            self._reader.text += text[start : start + _SLICE]
            out += self._run()
        return out

    def finish(self, *, cut_off: bool = False) -> list[MessageDelta]:
        """End the output and return the remaining deltas.

        Args:
            cut_off: whether the output was truncated, so that an incomplete call at its end is not an error.
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
