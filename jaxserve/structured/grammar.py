"""Grammars in llguidance's format: a list of named parts, each a JSON schema or rules in its dialect of Lark.

Grammars are not checked here but in `structured.validator`, in a process that can be killed.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NewType, Protocol

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from jaxserve.errors import RequestError

# The grammar of an output or of a part of it.
GrammarPart = NewType("GrammarPart", Mapping[str, Any])

# Any text of ordinary tokens; special tokens do not match it.
ANY_TEXT = r"/(.|\n)*/"
# Enough for deep indentation, but a limit for a model that generates only white space.
DEFAULT_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_MAX_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class JsonStyle:
    """Formatting of generated JSON.

    Attributes:
        whitespace: pattern of the white space allowed between JSON tokens; None for no white space.
    """

    whitespace: str | None = DEFAULT_WHITESPACE

    def options(self, *, strict: bool) -> dict[str, Any]:
        """Return the options that llguidance reads inside a schema."""
        if self.whitespace is None:
            return {"whitespace_flexible": False, "lenient": not strict}
        return {"whitespace_pattern": self.whitespace, "lenient": not strict}


class GrammarPrefix(NamedTuple):
    """Grammar of the text before a constrained output, such as thinking.

    Attributes:
        expression: expression that matches the text; empty for no text.
        rules: rules that the expression refers to.
    """

    expression: str = ""
    rules: tuple[str, ...] = ()


class Vocabulary(Protocol):
    """The part of a tokenizer that grammars need."""

    def split_special(self, text: str) -> Sequence[str | int]:
        """Split a text at its special tokens into plain text and token ids, in order."""
        ...

    def is_token(self, text: str) -> bool:
        """Return whether the text is a single token."""
        ...


class GrammarWriter:
    """Writes the grammars of one model.

    Args:
        vocabulary: vocabulary of the model.
        style: JSON style of the grammars.
    """

    def __init__(self, vocabulary: Vocabulary, style: JsonStyle) -> None:
        self.vocabulary = vocabulary
        self._split = vocabulary.split_special
        self._style = style

    def literal(self, text: str) -> str:
        """Return an expression for exactly this text, with its special tokens as token ids."""
        pieces = self._split(text)
        return " ".join(f"<[{piece}]>" if isinstance(piece, int) else _quoted(piece) for piece in pieces) or '""'

    def rule_until(self, name: str, end: str) -> str:
        """Return a rule for any text up to and including `end`, which must not be empty."""
        pieces = self._split(end)
        if isinstance(pieces[0], int):
            return f"{name}: {ANY_TEXT} {self.literal(end)}"
        first = str(pieces[0])
        rest = self.literal(end.removeprefix(first))
        return f"{name}: {name}_text {rest}\n{name}_text[suffix={_quoted(first)}]: {ANY_TEXT}"

    def inline_json(self, schema: Any, *, strict: bool) -> str:
        """Return an expression for a JSON value, for use in rules."""
        return "%json " + json.dumps(self._styled(schema, strict=strict))

    def json_schema(self, schema: Any, *, strict: bool) -> GrammarPart:
        """Return a grammar of JSON that follows a schema; unless strict, unenforceable keywords are ignored."""
        return GrammarPart({"json_schema": self._styled(schema, strict=strict)})

    def _styled(self, schema: Any, *, strict: bool) -> Any:
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        return {**schema, "x-guidance": self._style.options(strict=strict)}


def whole(alternatives: Sequence[tuple[GrammarPrefix, GrammarPart]]) -> str:
    """Return the grammar of a whole output: one of several alternatives, each a prefix and a part.

    Raises:
        RequestError: the grammar is too long.
    """
    [(before, part), *others] = alternatives
    parts: list[Mapping[str, Any]] = [part]
    if before.expression or others:
        starts = [f"{before.expression} @part_{number}" for number, (before, _) in enumerate(alternatives)]
        rules = dict.fromkeys(rule for before, _ in alternatives for rule in before.rules)
        main = "\n".join((f"start: {' | '.join(starts)}", *rules))
        named = [{"name": f"part_{number}", **part} for number, (_, part) in enumerate(alternatives)]
        parts = [{"name": "main", "lark_grammar": main}, *named]
    text = json.dumps({"grammars": parts})
    if len(text) > _MAX_CHARACTERS:
        raise RequestError(f"the grammar has {len(text)} characters, the limit is {_MAX_CHARACTERS}")
    return text


def regex(pattern: str) -> GrammarPart:
    """Return a grammar of text that matches the whole pattern."""
    [part] = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"]
    return lark(part["lark_grammar"])


def ebnf(text: str) -> GrammarPart:
    """Return the grammar of a GBNF text with a rule `root` (or a Lark text with a rule `start`).

    Raises:
        RequestError: the text cannot be parsed.
    """
    try:
        return lark(any_to_lark(text))
    except Exception as error:  # any_to_lark raises plain Exceptions
        message = str(error) if not isinstance(error, RecursionError) else "it is nested too deeply"
        raise RequestError(f"ebnf: {message[:300]}", param="ebnf") from None


def lark(text: str) -> GrammarPart:
    """Return the grammar of rules in llguidance's dialect of Lark."""
    return GrammarPart({"lark_grammar": text})


def _quoted(text: str) -> str:
    return json.dumps(text)


def tagged_text(tag: str, repeat: str, rules: Iterable[str]) -> str:
    """Return rules for any text with tags in it.

    Args:
        tag: expression for the text up to and including a tag.
        repeat: `*` for any number of tags, `?` for at most one.
        rules: rules that the expression refers to.
    """
    return "\n".join((f"start: ({tag}){repeat} TEXT", f"TEXT: {ANY_TEXT}", *rules))
