"""Formats whose calls form a section between special tokens: DeepSeek V3 and V3.1, Kimi K2."""

import re

from jaxserve.parsing.stream_reader import Parse
from jaxserve.parsing.tool_calls.parser import NoCallError, ToolCallParser

_KIMI_ID = re.compile(r"(?:functions\.)?(?P<name>[\w.-]+):(?P<index>\d+)")


class SectionParser(ToolCallParser):
    """Base class for a section of calls between markers. A subclass reads one call in `_call`."""

    section_begin: str
    section_end: str
    call_begin: str
    call_end: str

    def _calls(self) -> Parse[None]:
        while (marker := (yield from self._reader.until((self.section_begin,), self._text))) is not None:
            yield from self._attempt(marker, self._section())

    def _section(self) -> Parse[None]:
        reader = self._reader
        while True:
            yield from reader.space()
            marker = yield from reader.accept(self.call_begin, self.section_end)
            if marker != self.call_begin:
                # A section must contain a call; a section without an end marker ends after its last call.
                if not self._after_call:
                    raise NoCallError
                return
            yield from self._call()
            yield from reader.space()
            yield from reader.accept(self.call_end)

    def _call(self) -> Parse[None]:
        raise NotImplementedError

    def _until(self, marker: str) -> Parse[str]:
        """Read the text before a marker of the current call.

        Raises:
            NoCallError: the call ends without the marker.
        """
        parts: list[str] = []
        if (yield from self._reader.until((marker, self.call_end, self.section_end), parts.append)) != marker:
            raise NoCallError
        return "".join(parts).strip()


class DeepSeekV3Parser(SectionParser):
    """`function<｜tool▁sep｜>NAME`, a line break, and the arguments in a JSON code fence."""

    section_begin, section_end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    call_begin, call_end = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"

    def _call(self) -> Parse[None]:
        yield from self._until("<｜tool▁sep｜>")
        self._start((yield from self._until("```json")))
        yield from self._json_arguments()
        yield from self._reader.space()
        yield from self._reader.accept("```")
        self._end()


class DeepSeekV31Parser(DeepSeekV3Parser):
    """`NAME<｜tool▁sep｜>{...}`, between the same markers."""

    def _call(self) -> Parse[None]:
        self._start((yield from self._until("<｜tool▁sep｜>")))
        yield from self._json_arguments()
        self._end()


class KimiK2Parser(SectionParser):
    """`functions.NAME:INDEX<|tool_call_argument_begin|>{...}`; the text before the marker is the call's id."""

    section_begin, section_end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    call_begin, call_end = "<|tool_call_begin|>", "<|tool_call_end|>"

    def _call(self) -> Parse[None]:
        call_id = yield from self._until("<|tool_call_argument_begin|>")
        match = _KIMI_ID.fullmatch(call_id)
        if match is None:
            raise NoCallError
        self._start(match["name"], call_id)
        yield from self._json_arguments()
        self._end()
