"""Grammars in llguidance's form: a list of named parts, each a JSON schema or rules in its dialect of Lark.

Nothing here checks a grammar; `structured.validator` does, in a process that can be ended.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NewType, Protocol

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from jaxserve.errors import RequestError

# One part: what an output, or a piece of it, must be.
GrammarPart = NewType("GrammarPart", Mapping[str, Any])

# Any text of ordinary tokens: special ones are no text.
ANY_TEXT = r"/(.|\n)*/"
# Enough for deep indentation, and an end to a model that writes nothing but spaces.
DEFAULT_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_MAX_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class JsonStyle:
    """How JSON may be laid out.

    Attributes:
        whitespace: pattern of what may stand between tokens; None for nothing.
    """

    whitespace: str | None = DEFAULT_WHITESPACE

    def options(self, *, strict: bool) -> dict[str, Any]:
        """As llguidance takes them inside a schema."""
        if self.whitespace is None:
            return {"whitespace_flexible": False, "lenient": not strict}
        return {"whitespace_pattern": self.whitespace, "lenient": not strict}


class GrammarPrefix(NamedTuple):
    """What may come before a constrained output.

    Attributes:
        expression: empty for nothing.
        rules: that it refers to.
    """

    expression: str = ""
    rules: tuple[str, ...] = ()


class Vocabulary(Protocol):
    """What grammars need to know of a tokenizer."""

    def split_special(self, text: str) -> Sequence[str | int]:
        """A text cut at the special tokens in it: plain pieces and ids, in order."""
        ...

    def is_token(self, text: str) -> bool:
        """Whether the text is one token."""
        ...


class GrammarWriter:
    """Writes the grammars of one model.

    Args:
        vocabulary: the model's.
        style: JSON style of the grammars.
    """

    def __init__(self, vocabulary: Vocabulary, style: JsonStyle) -> None:
        self.vocabulary = vocabulary
        self._split = vocabulary.split_special
        self._style = style

    def literal(self, text: str) -> str:
        """A text, special tokens in it as such."""
        pieces = self._split(text)
        return " ".join(f"<[{piece}]>" if isinstance(piece, int) else _quoted(piece) for piece in pieces) or '""'

    def rule_until(self, name: str, end: str) -> str:
        """A rule for any text up to and with `end`, which is not empty."""
        pieces = self._split(end)
        if isinstance(pieces[0], int):
            return f"{name}: {ANY_TEXT} {self.literal(end)}"
        first = str(pieces[0])
        rest = self.literal(end.removeprefix(first))
        return f"{name}: {name}_text {rest}\n{name}_text[suffix={_quoted(first)}]: {ANY_TEXT}"

    def inline_json(self, schema: Any, *, strict: bool) -> str:
        """A JSON value inside rules."""
        return "%json " + json.dumps(self._styled(schema, strict=strict))

    def json_schema(self, schema: Any, *, strict: bool) -> GrammarPart:
        """JSON that follows a schema. Not strict: keywords that cannot be enforced are left out."""
        return GrammarPart({"json_schema": self._styled(schema, strict=strict)})

    def _styled(self, schema: Any, *, strict: bool) -> Any:
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        return {**schema, "x-guidance": self._style.options(strict=strict)}


def whole(alternatives: Sequence[tuple[GrammarPrefix, GrammarPart]]) -> str:
    """The grammar of a whole output: one of the parts after what comes before it.

    Raises:
        RequestError: it is too long.
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
    """Text that matches a pattern as a whole."""
    [part] = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"]
    return lark(part["lark_grammar"])


def ebnf(text: str) -> GrammarPart:
    """GBNF with a rule `root` (or Lark with a rule `start`).

    Raises:
        RequestError: it cannot be read.
    """
    try:
        return lark(any_to_lark(text))
    except Exception as error:  # it raises plain ones
        message = str(error) if not isinstance(error, RecursionError) else "it is nested too deeply"
        raise RequestError(f"ebnf: {message[:300]}", param="ebnf") from None


def lark(text: str) -> GrammarPart:
    """Rules in llguidance's dialect of Lark."""
    return GrammarPart({"lark_grammar": text})


def _quoted(text: str) -> str:
    return json.dumps(text)


def tagged_text(tag: str, repeat: str, rules: Iterable[str]) -> str:
    """Rules for any text with tags in it.

    Args:
        tag: an expression for text up to a tag and the tag itself.
        repeat: `*` for any number of them, `?` for one at most.
        rules: that the expression refers to.
    """
    return "\n".join((f"start: ({tag}){repeat} TEXT", f"TEXT: {ANY_TEXT}", *rules))
