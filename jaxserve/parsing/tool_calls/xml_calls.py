"""Formats that write each argument between tags, without JSON: Qwen3-Coder, GLM 4.5.

Values are converted to the types in the tool's schema. A string is streamed as it is written, any other value is
emitted once it is complete.
"""

import ast
import json
from collections.abc import Sequence
from typing import Any

from jaxserve.parsing.stream_reader import Parse
from jaxserve.parsing.tool_calls.parser import NoCallError, ToolCallParser, to_json
from jaxserve.parsing.tool_calls.tool import Tool


class XmlParser(ToolCallParser):
    """Base class that streams arguments one by one."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools)
        self._tool: Tool | None = None
        self._num_arguments = 0

    def _calls(self) -> Parse[None]:
        while (marker := (yield from self._reader.until(("<tool_call>",), self._text))) is not None:
            yield from self._attempt(marker, self._call())

    def _call(self) -> Parse[None]:
        raise NotImplementedError

    def _start_call(self, name: str) -> None:
        self._start(name)
        self._tool = self._tools[name]
        self._num_arguments = 0

    def _argument(self, name: str, ends: Sequence[str]) -> Parse[None]:
        """Read a value up to one of `ends` and emit it as JSON.

        Raises:
            NoCallError: the end is missing.
        """
        assert self._tool is not None
        types = self._tool.types_of(name)
        self._arguments(("{" if self._num_arguments == 0 else ", ") + json.dumps(name, ensure_ascii=False) + ": ")
        self._num_arguments += 1
        if types == _STRING:
            self._arguments('"')
            if (yield from self._reader.until(ends, self._string_part)) is None:
                raise NoCallError
            self._arguments('"')
        else:
            parts: list[str] = []
            if (yield from self._reader.until(ends, parts.append)) is None:
                raise NoCallError
            self._arguments(to_json(_typed("".join(parts), types)))

    def _string_part(self, text: str) -> None:
        self._arguments(json.dumps(text, ensure_ascii=False)[1:-1])

    def _end_call(self) -> None:
        self._arguments("{}" if self._num_arguments == 0 else "}")
        self._end()


class Qwen3CoderParser(XmlParser):
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`, with line breaks between.

    The outer tags and the last end tags may be missing.
    """

    def _calls(self) -> Parse[None]:
        # With strict tools, only calls after the outer tag are constrained by the grammar.
        strict = any(tool.strict for tool in self._tools.values())
        markers = ("<tool_call>",) if strict else ("<tool_call>", "<function=")
        while (marker := (yield from self._reader.until(markers, self._text))) is not None:
            yield from self._attempt(marker, self._call() if marker == "<tool_call>" else self._function())

    def _call(self) -> Parse[None]:
        yield from self._reader.space()
        yield from self._expect("<function=")
        yield from self._function()

    def _function(self) -> Parse[None]:
        reader = self._reader
        self._start_call((yield from self._name()))
        while True:
            yield from reader.space()
            marker = yield from reader.accept("<parameter=", "</function>", "</tool_call>")
            if marker != "<parameter=":
                break
            name = yield from self._name()
            yield from reader.accept("\n")
            yield from self._argument(name, ("\n</parameter>", "</parameter>"))
        if marker is None and (reader.text or self._cut_off):
            raise NoCallError
        if marker == "</function>":
            yield from reader.space()
            yield from reader.accept("</tool_call>")
        self._end_call()

    def _name(self) -> Parse[str]:
        parts: list[str] = []
        if (yield from self._reader.until((">", "\n"), parts.append)) != ">":
            raise NoCallError
        return "".join(parts).strip()


class Glm45Parser(XmlParser):
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`, with line breaks between."""

    def _call(self) -> Parse[None]:
        reader = self._reader
        name: list[str] = []
        marker = yield from reader.until(("<arg_key>", "</tool_call>"), name.append)
        self._start_call("".join(name).strip())
        while marker == "<arg_key>":
            key: list[str] = []
            if (yield from reader.until(("</arg_key>",), key.append)) is None:
                raise NoCallError
            yield from reader.space()
            yield from self._expect("<arg_value>")
            yield from self._argument("".join(key).strip(), ("</arg_value>",))
            yield from reader.space()
            marker = yield from reader.accept("<arg_key>", "</tool_call>")
        if marker is None and (reader.text or self._cut_off):
            raise NoCallError
        self._end_call()


def _typed(text: str, types: frozenset[str]) -> Any:
    """Convert a value to one of its types, or return it as text; without types, any valid JSON is converted."""
    if not types:
        types, readers = _ANY, (json.loads,)
    else:
        readers = (json.loads, ast.literal_eval)
    for read in readers:
        try:
            value = read(text.strip())
            to_json(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if _JSON_TYPES.get(type(value), frozenset()) & types:
            return value
    return text if "string" in types else text.strip()


_JSON_TYPES: dict[type, frozenset[str]] = {
    str: frozenset({"string"}),
    bool: frozenset({"boolean"}),
    int: frozenset({"integer", "number"}),
    float: frozenset({"number"}),
    list: frozenset({"array"}),
    dict: frozenset({"object"}),
    type(None): frozenset({"null"}),
}
_STRING = frozenset({"string"})
_ANY = frozenset().union(*_JSON_TYPES.values())
