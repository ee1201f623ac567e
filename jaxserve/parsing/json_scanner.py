"""Incremental scanner of one JSON value in streamed text.

Common deviations in model output are accepted and converted to strict JSON: control characters inside strings,
Python's strings and literals, a comma before a closing bracket.
"""

import json
import re
from enum import Enum, auto

_PLAIN = re.compile(r"[^\"'\\\x00-\x1f]+")
_SCALAR = re.compile(r"[-+.\w]+", re.ASCII)
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", re.ASCII)
_LITERALS = {
    "true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null",
}  # fmt: skip
_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_CLOSING = {"{": "}", "[": "]"}
_SPACES = " \t\r\n"
_MAX_DEPTH = 512


class _Expect(Enum):
    VALUE = auto()
    FIRST_ITEM = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    NEXT = auto()
    STRING = auto()
    ESCAPE = auto()


class JsonScanner:
    """Scanner state between two chunks of a value.

    Attributes:
        done: whether the value is complete.
        failed: whether the text cannot become a JSON value.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._expect = _Expect.VALUE
        self._stack: list[str] = []
        self._quote = ""
        self._in_key = False
        self._comma = ""

    def scan(self, text: str, *, closed: bool) -> tuple[str, int]:
        """Continue with more text.

        Args:
            text: text from where the last call stopped reading.
            closed: whether the input ends with this text.

        Returns:
            The text that was read, as strict JSON, and the number of characters read.
        """
        out: list[str] = []
        position = 0
        while position < len(text) and not (self.done or self.failed):
            if self._expect is _Expect.STRING:
                count = self._string(text, position, out)
            elif self._expect is _Expect.ESCAPE:
                count = self._escape(text, position, out)
            elif text[position] in _SPACES:
                if self._comma:
                    self._comma += text[position]
                else:
                    out.append(text[position])
                count = 1
            else:
                count = self._token(text, position, out, closed=closed)
            if count == 0:
                break
            position += count
        return "".join(out), position

    def _token(self, text: str, position: int, out: list[str], *, closed: bool) -> int:
        """Read one bracket, separator, opening quote or whole scalar; return 0 to wait for more text."""
        character = text[position]
        match self._expect, character:
            case (_Expect.COLON, ":"):
                self._expect = _Expect.VALUE
                out.append(":")
            case (_Expect.NEXT, ","):
                # Held back, with the space after it, until an item follows; a trailing comma is dropped.
                self._comma = ","
                self._expect = _Expect.KEY if self._stack[-1] == "{" else _Expect.VALUE
            case (_Expect.NEXT | _Expect.FIRST_ITEM | _Expect.FIRST_KEY | _Expect.VALUE | _Expect.KEY, "}" | "]"):
                self._close(character, out)
            case (_Expect.FIRST_KEY | _Expect.KEY, '"' | "'"):
                self._open_string(character, out, in_key=True)
            case (_Expect.VALUE | _Expect.FIRST_ITEM, '"' | "'"):
                self._open_string(character, out, in_key=False)
            case (_Expect.VALUE | _Expect.FIRST_ITEM, "{" | "[") if len(self._stack) < _MAX_DEPTH:
                self._stack.append(character)
                self._expect = _Expect.FIRST_KEY if character == "{" else _Expect.FIRST_ITEM
                out.append(self._take_comma() + character)
            case (_Expect.VALUE | _Expect.FIRST_ITEM, _):
                return self._scalar(text, position, out, closed=closed)
            case _:
                self.failed = True
        return 0 if self.failed else 1

    def _close(self, character: str, out: list[str]) -> None:
        after_comma = self._comma and self._expect in (_Expect.VALUE, _Expect.KEY)
        may_close = self._expect in (_Expect.NEXT, _Expect.FIRST_ITEM, _Expect.FIRST_KEY) or after_comma
        if not (may_close and self._stack and _CLOSING[self._stack[-1]] == character):
            self.failed = True
            return
        self._comma = ""
        self._stack.pop()
        out.append(character)
        self._end_value()

    def _open_string(self, quote: str, out: list[str], *, in_key: bool) -> None:
        self._quote = quote
        self._in_key = in_key
        self._expect = _Expect.STRING
        out.append(self._take_comma() + '"')

    def _string(self, text: str, position: int, out: list[str]) -> int:
        plain = _PLAIN.match(text, position)
        if plain is not None:
            out.append(plain.group())
            return plain.end() - position
        character = text[position]
        if character == self._quote:
            out.append('"')
            if self._in_key:
                self._expect = _Expect.COLON
            else:
                self._end_value()
        elif character == "\\":
            self._expect = _Expect.ESCAPE
        elif character == "'":
            out.append(character)
        else:  # a bare double quote in a Python string, or a control character
            out.append(json.dumps(character)[1:-1])
        return 1

    def _escape(self, text: str, position: int, out: list[str]) -> int:
        """Read what follows a backslash; return 0 to wait for more text."""
        character = text[position]
        size = 1
        if character in _ESCAPES:
            out.append("\\" + character)
        elif character == "'":
            out.append("'")
        elif character == "\n":
            out.append("\\n")
        elif character == "u":
            digits = text[position + 1 : position + 5]
            if not _HEX.issuperset(digits):
                self.failed = True
                return 0
            if len(digits) < 4:
                return 0
            out.append("\\u" + digits)
            size = 5
        else:
            self.failed = True
            return 0
        self._expect = _Expect.STRING
        return size

    def _scalar(self, text: str, position: int, out: list[str], *, closed: bool) -> int:
        match = _SCALAR.match(text, position)
        if match is None:
            self.failed = True
            return 0
        if match.end() == len(text) and not closed:
            return 0
        word = match.group()
        value = _LITERALS.get(word) or (word if _NUMBER.fullmatch(word) else None)
        if value is None:
            self.failed = True
            return 0
        out.append(self._take_comma() + value)
        self._end_value()
        return len(word)

    def _take_comma(self) -> str:
        comma, self._comma = self._comma, ""
        return comma

    def _end_value(self) -> None:
        self._expect = _Expect.NEXT
        self.done = not self._stack
