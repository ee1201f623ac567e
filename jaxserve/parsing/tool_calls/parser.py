"""Base class of the tool-call parsers.

A call is streamed as it is written: first its name, then its arguments as long as they are valid JSON. Text that looked
like a call and is not one is content. A call that is cut off by the end of the output is never closed. Content keeps
its text, except for white space next to calls.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.parsing.deltas import CallArguments, CallEnd, CallFailed, CallStart, Content
from jaxserve.parsing.stream_parser import StreamParser
from jaxserve.parsing.stream_reader import Parse
from jaxserve.parsing.tool_calls.tool import Tool

_ARGUMENTS = ("arguments", "parameters")


class NoCallError(Exception):
    """The text being read is not a call of a declared tool."""


class ToolCallParser(StreamParser):
    """Base class of the formats' parsers.

    A subclass reads calls in `_calls`, and wraps text that may turn out not to be a call in `_attempt`.

    Args:
        tools: tools that may be called.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__()
        self._tools: Mapping[str, Tool] = {tool.name: tool for tool in tools}
        self._num_calls = 0
        self._open = False
        self._held_space = ""
        self._after_call = False

    def _parse(self) -> Parse[None]:
        yield from self._calls()
        yield from self._reader.rest(self._text)
        if not self._after_call:
            self._content(self._held_space)

    def _calls(self) -> Parse[None]:
        raise NotImplementedError

    def _text(self, text: str) -> None:
        """Emit content. White space is held back until text follows it, because it is dropped next to a call."""
        if self._after_call:
            text = text.lstrip()
        stripped = text.rstrip()
        if stripped:
            self._out.append(Content(self._held_space + stripped))
            self._held_space = text[len(stripped) :]
            self._after_call = False
        else:
            self._held_space += text

    def _attempt(self, marker: str, call: Parse[None]) -> Parse[bool]:
        """Read what `marker` announced. If it is not a call, the text since the last complete call is content."""
        self._reader.record(marker)
        try:
            yield from call
        except NoCallError:
            raw = self._reader.recorded()
            if self._open and self._cut_off and not self._reader.text:
                return False  # a call that was cut off
            if self._open:
                self._out.append(CallFailed(self._num_calls, self._held_space + raw))
                self._held_space = ""
                self._open = False
                self._num_calls += 1
                self._after_call = False
            else:
                self._text(raw)
            return False
        return True

    def _start(self, name: Any, call_id: str | None = None) -> None:
        """Start a call of this name; a name read from JSON may be any value.

        Raises:
            NoCallError: no tool of this name is declared.
        """
        if not isinstance(name, str) or name not in self._tools:
            raise NoCallError
        self._open = True
        self._out.append(CallStart(self._num_calls, name, call_id))

    def _arguments(self, text: str) -> None:
        if text:
            self._out.append(CallArguments(self._num_calls, text))

    def _end(self) -> None:
        self._out.append(CallEnd(self._num_calls))
        self._held_space = ""
        self._open = False
        self._num_calls += 1
        self._after_call = True
        self._reader.record()

    def _json_arguments(self) -> Parse[None]:
        """Read the arguments of the started call, a JSON object.

        Raises:
            NoCallError: the text is not a JSON object.
        """
        yield from self._reader.space()
        if (yield from self._reader.peek()) != "{" or not (yield from self._reader.json(self._arguments)):
            raise NoCallError

    def _json_call(self) -> Parse[None]:
        """Read `{"name": NAME, "arguments": {...}}`, with the keys in any order; other keys are ignored.

        Raises:
            NoCallError: the text is not such an object.
        """
        reader = self._reader
        name: Any = None
        early: str | None = None  # arguments that came before the name
        yield from self._expect("{")
        while True:
            yield from reader.space()
            yield from reader.accept(",")
            yield from reader.space()
            if (yield from reader.accept("}")) is not None:
                break
            key = yield from self._json_value()
            yield from reader.space()
            yield from self._expect(":")
            yield from reader.space()
            if key in _ARGUMENTS and name is not None and not self._open:
                self._start(name)
                yield from self._arguments_value()
            elif key in _ARGUMENTS and not self._open:
                early = _as_object((yield from self._json_value()))
            elif key == "name" and name is None:
                name = yield from self._json_value()
            else:
                yield from self._json_value()
        if not self._open:
            self._start(name)
            self._arguments(early or "{}")
        self._end()

    def _arguments_value(self) -> Parse[None]:
        if (yield from self._reader.peek()) == "{":
            yield from self._json_arguments()
        else:
            self._arguments(_as_object((yield from self._json_value())))

    def _json_value(self) -> Parse[Any]:
        parts: list[str] = []
        if not (yield from self._reader.json(parts.append)):
            raise NoCallError
        try:
            return json.loads("".join(parts))
        except (ValueError, RecursionError):  # a number with thousands of digits, brackets nested thousands deep
            raise NoCallError from None

    def _expect(self, literal: str) -> Parse[None]:
        if (yield from self._reader.accept(literal)) is None:
            raise NoCallError


def _as_object(value: Any) -> str:
    """Return arguments as JSON text; some models write the object inside a string."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise NoCallError from None
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise NoCallError
    try:
        return to_json(value)
    except (ValueError, RecursionError):
        raise NoCallError from None


def to_json(value: Any) -> str:
    """Return JSON text that UTF-8 can encode: a lone surrogate stays an escape.

    Raises:
        ValueError, TypeError, RecursionError: the value cannot be written as JSON.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
