"""Tool calls as a list of Python calls: `[f(a=1), g()]` (Llama 4 and others)."""

import ast
import re
import warnings
from itertools import count
from typing import Any, ClassVar

from jaxserve.parsing.stream_reader import Parse
from jaxserve.parsing.tool_calls.parser import NoCallError, ToolCallParser, to_json

_BEGIN, _END = "<|python_start|>", "<|python_end|>"
_NAME_CHARACTER = re.compile(r"[\w.]")
_QUOTES = ("'", '"')


class PythonicParser(ToolCallParser):
    """A list at the start of the output, or between `<|python_start|>` and `<|python_end|>`."""

    def _calls(self) -> Parse[None]:
        self._text((yield from self._reader.space()))
        if (yield from self._reader.peek()) == "[":
            yield from self._attempt("", self._list())
        while (marker := (yield from self._reader.until((_BEGIN, _END), self._text))) is not None:
            if marker == _BEGIN:
                yield from self._attempt(_BEGIN, self._list())

    def _list(self) -> Parse[None]:
        reader = self._reader
        yield from reader.space()
        yield from self._expect("[")
        while True:
            yield from reader.space()
            yield from self._call()
            yield from reader.space()
            if (yield from reader.accept(",")) is None:
                break
        yield from self._expect("]")

    def _call(self) -> Parse[None]:
        source = yield from self._source()
        try:
            with warnings.catch_warnings(action="ignore"):  # about unknown escape sequences
                call = ast.parse(source, mode="eval").body
            if not isinstance(call, ast.Call) or call.args:
                raise NoCallError
            if any(keyword.arg is None for keyword in call.keywords):
                raise NoCallError
            text = to_json({str(keyword.arg): _value(keyword.value) for keyword in call.keywords})
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            raise NoCallError from None
        self._start(ast.unparse(call.func))
        self._arguments(text)
        self._end()

    def _source(self) -> Parse[str]:
        """Read the source of one call, up to its closing bracket."""
        reader = self._reader
        depth = 0
        quote = ""
        escaped = False
        for index in count():
            while index >= len(reader.text):
                if reader.closed:
                    raise NoCallError
                yield
            character = reader.text[index]
            if quote:
                quote = "" if character == quote and not escaped else quote
                escaped = character == "\\" and not escaped
            elif character in _QUOTES and depth:
                quote = character
            elif character in "([{":
                depth += 1
            elif character in ")]}":
                depth -= 1
                if depth <= 0:
                    return reader.take(index + 1)
            elif depth == 0 and not _NAME_CHARACTER.fullmatch(character):
                raise NoCallError
        raise AssertionError


class _JsonWords(ast.NodeTransformer):
    """Replaces JSON's `true`, `false` and `null` by Python's constants."""

    _values: ClassVar[dict[str, bool | None]] = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Replace a name that is a JSON literal by its value."""
        return ast.Constant(self._values[node.id]) if node.id in self._values else node


def _value(node: ast.expr) -> Any:
    return ast.literal_eval(_JsonWords().visit(node))
