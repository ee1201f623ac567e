"""Grammars that make a model write tool calls in its own format."""

import json
import keyword
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxserve.errors import RequestError
from jaxserve.parsing.tool_calls.tool import Tool
from jaxserve.structured.grammar import GrammarPart, GrammarWriter, lark, tagged_text


class CallSyntax(Protocol):
    """Writes the grammars of a tool-call format."""

    def calls(self, writer: GrammarWriter, tools: Sequence[Tool], *, parallel: bool) -> GrammarPart:
        """Return a grammar of one call, or of one or more calls if `parallel`, and nothing else."""
        ...

    def text_and_calls(self, writer: GrammarWriter, tools: Sequence[Tool], *, parallel: bool) -> GrammarPart:
        """Return a grammar of any text in which every call is a call of a declared tool."""
        ...


@dataclass(frozen=True, kw_only=True)
class Section:
    """Calls between markers. In `before`, `{name}` is the tool's name and `{index}` a number.

    Attributes:
        begin, end: text around the list of calls.
        before, after: text around the arguments of each call.
        separator: text between two calls.
        trigger: prefix of `begin` + `before` that announces calls inside text; empty if calls can only occur at the
            start of an output.
        arguments: how the arguments are written.
    """

    before: str
    after: str
    begin: str = ""
    end: str = ""
    separator: str = "\n"
    trigger: str = ""
    arguments: "Arguments"

    def calls(self, writer: GrammarWriter, tools: Sequence[Tool], *, parallel: bool) -> GrammarPart:
        """See `CallSyntax`."""
        section = self._section(writer, self.begin, parallel=parallel)
        return lark("\n".join((f"start: {section}", *self._rules(writer, tools))))

    def text_and_calls(self, writer: GrammarWriter, tools: Sequence[Tool], *, parallel: bool) -> GrammarPart:
        """See `CallSyntax`."""
        if not self.trigger:
            section = self._section(writer, self.begin, parallel=parallel)
            first = json.dumps((self.begin + self.before)[0])[1:-1]
            start = f'start: {section} | OTHER_TEXT | ""\nOTHER_TEXT: /\\s*[^\\s\\{first}](.|\\n)*|\\s+/'
            return lark("\n".join((start, *self._rules(writer, tools))))
        repeat = "*" if parallel else "?"
        if self.begin:
            body = self._section(writer, self.begin.removeprefix(self.trigger), parallel=parallel)
            rules = self._rules(writer, tools)
        else:
            body = f"call {writer.literal(self.end)}"
            rules = self._rules(writer, tools, skip=len(self.trigger))
        text = writer.rule_until("announced", self.trigger)
        return lark(tagged_text(f"announced {body}", repeat, (text, *rules)))

    def _section(self, writer: GrammarWriter, begin: str, *, parallel: bool) -> str:
        more = f"({writer.literal(self.separator)} call)*" if parallel else ""
        return f"{writer.literal(begin)} call {more} {writer.literal(self.end)}"

    def _rules(self, writer: GrammarWriter, tools: Sequence[Tool], skip: int = 0) -> Iterable[str]:
        yield "call: " + " | ".join(f"call_{number}" for number in range(len(tools)))
        for number, tool in enumerate(tools):
            # The skipped text precedes the name, so the name is substituted after skipping.
            pieces = self.before[skip:].replace("{name}", tool.name).split("{index}")
            before = " /[0-9]+/ ".join(writer.literal(piece) for piece in pieces)
            yield f"call_{number}: {before} arguments_{number} {writer.literal(self.after)}"
            yield from self.arguments.rules(writer, tool, f"arguments_{number}")


class Arguments(Protocol):
    """Writes the grammar rules of a call's arguments."""

    def rules(self, writer: GrammarWriter, tool: Tool, name: str) -> Iterable[str]:
        """Yield a rule called `name` for the tool's arguments, and the rules that it refers to."""
        ...


class JsonArguments:
    """Arguments as one JSON object."""

    def rules(self, writer: GrammarWriter, tool: Tool, name: str) -> Iterable[str]:
        """See `Arguments`."""
        yield f"{name}: {writer.inline_json(object_schema(tool), strict=tool.strict)}"


@dataclass(frozen=True, kw_only=True)
class TaggedArguments:
    """Arguments one after the other between tags, strings without quotes. `{key}` is an argument's name."""

    before: str
    after: str

    def rules(self, writer: GrammarWriter, tool: Tool, name: str) -> Iterable[str]:
        """See `Arguments`."""
        properties, required = parameters(tool)
        items: list[str] = []
        for number, (key, schema) in enumerate(properties.items()):
            item = f"{name}_{number}"
            items.append(item if key in required else f"{item}?")
            before = writer.literal(self.before.replace("{key}", key))
            types = tool.types_of(key)
            options = _options(schema)
            if types == _STRING and options:
                values = " | ".join(writer.literal(option) for option in options)
                yield f"{item}: {before} ({values}) {writer.literal(self.after)}"
            elif types == _STRING:
                if tool.strict and not _UNENFORCEABLE.isdisjoint(schema):
                    raise RequestError(
                        f"tools: this model writes strings without quotes, so a strict {key!r} cannot have "
                        f"{' or '.join(sorted(_UNENFORCEABLE.intersection(schema)))}",
                        param="tools",
                    )
                if "minLength" in schema or "maxLength" in schema:
                    # A string of limited length must not contain the characters that the end tag starts with.
                    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
                    yield f"{item}: {before} /[^<\\n]{{{low},{high}}}/ {writer.literal(self.after)}"
                else:
                    yield f"{item}: {before} {item}_text"
                    yield writer.rule_until(f"{item}_text", self.after)
            else:
                value = _with_definitions(schema, tool)
                yield f"{item}: {before} {item}_value {writer.literal(self.after)}"
                yield f"{item}_value: {writer.inline_json(value, strict=tool.strict)}"
        yield f"{name}: " + (" ".join(items) or '""')


_STRING = frozenset({"string"})
_UNENFORCEABLE = frozenset({"format", "pattern"})


def _options(schema: Any) -> list[str]:
    """Return the strings that a schema allows; empty if it does not list them."""
    values: Any = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else []


class KeywordArguments:
    """Arguments as Python keyword arguments with JSON values."""

    def rules(self, writer: GrammarWriter, tool: Tool, name: str) -> Iterable[str]:
        """See `Arguments`."""
        properties, required = parameters(tool)
        for word in (*tool.name.split("."), *properties):
            if not word.isidentifier() or keyword.iskeyword(word):
                raise RequestError(
                    f"tools: this model writes Python calls, in which {word!r} is not a valid name", param="tools"
                )
        keys = sorted(properties, key=lambda key: key not in required)
        for number, key in enumerate(keys):
            value = _with_definitions(properties[key], tool)
            yield f"{name}_{number}: {writer.literal(key + '=')} {name}_{number}_value"
            yield f"{name}_{number}_value: {writer.inline_json(value, strict=tool.strict)}"
        num_required = sum(key in required for key in keys)
        items = [f"{name}_{number}" for number in range(len(keys))]
        if num_required:
            optional = "".join(f' (", " {item})?' for item in items[num_required:])
            yield f"{name}: " + ' ", " '.join(items[:num_required]) + optional
        else:
            # All are optional, and any of them may be the first.
            starts = [
                item + "".join(f' (", " {later})?' for later in items[number + 1 :])
                for number, item in enumerate(items)
            ]
            yield f"{name}: " + " | ".join([*starts, '""'])


def object_schema(tool: Tool) -> dict[str, Any]:
    """Return the schema of a tool's arguments, always that of an object."""
    return {**tool.parameters, "type": "object"}


def parameters(tool: Tool) -> tuple[dict[str, Any], set[str]]:
    """Return the schemas of a tool's arguments by name, and the names of the required arguments."""
    properties = tool.parameters.get("properties")
    required = tool.parameters.get("required")
    return (
        dict(properties) if isinstance(properties, dict) else {},
        {name for name in required if isinstance(name, str)} if isinstance(required, list) else set(),
    )


def _with_definitions(schema: Any, tool: Tool) -> Any:
    """Return a property's schema with the definitions that it may refer to."""
    definitions = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    return {**schema, **definitions} if isinstance(schema, dict) else schema
