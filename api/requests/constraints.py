"""Constraints that a request puts on its output: a JSON schema, a regex, a grammar or tags."""

from typing import Any

import msgspec

from api.requests.schemas import CommonRequest, ResponseFormat
from jaxserve.errors import RequestError
from jaxserve.structured.grammar import GrammarPart, GrammarWriter, ebnf, lark, regex, tagged_text

_MAX_STRUCTURES = 256


def read_constraint(body: CommonRequest, writer: GrammarWriter) -> tuple[GrammarPart | None, str | None]:
    """Return the output's grammar, if it has one, and the request field that requires it.

    Raises:
        RequestError: several fields require a grammar, or the field is not valid.
    """
    format = body.response_format
    given = [name for name in ("regex", "ebnf", "json_schema") if getattr(body, name) is not None]
    if format is not None and format.type != "text":
        given.insert(0, "response_format")
    if len(given) > 1:
        raise RequestError(f"at most one of {', '.join(given)} can be given", param=given[1])
    match given:
        case ["response_format"]:
            assert format is not None
            return _response_format(format, writer), "response_format"
        case ["regex"]:
            assert body.regex is not None
            return regex(body.regex), "regex"
        case ["ebnf"]:
            assert body.ebnf is not None
            return ebnf(body.ebnf), "ebnf"
        case ["json_schema"]:
            return writer.json_schema(_schema(body.json_schema), strict=True), "json_schema"
        case _:
            return None, None


def _schema(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        schema: Any = msgspec.json.decode(given)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"json_schema is not JSON: {error}", param="json_schema") from None
    if not isinstance(schema, dict | bool):
        raise RequestError("json_schema must be a JSON object as text", param="json_schema")
    return schema


def _response_format(format: ResponseFormat, writer: GrammarWriter) -> GrammarPart:
    match format.type:
        case "json_object":
            return writer.json_schema({"type": "object"}, strict=True)
        case "json_schema":
            wanted = format.json_schema
            if wanted is None or wanted.schema is None:
                raise RequestError("response_format.json_schema.schema is missing", param="response_format")
            return writer.json_schema(wanted.schema, strict=bool(wanted.strict))
        case _:
            return _tags(format, writer)


def _tags(format: ResponseFormat, writer: GrammarWriter) -> GrammarPart:
    structures, triggers = format.structures, format.triggers
    if not structures or not triggers:
        raise RequestError("response_format.structures and .triggers must not be empty", param="response_format")
    if len(structures) > _MAX_STRUCTURES:
        raise RequestError(f"{len(structures)} structures, the limit is {_MAX_STRUCTURES}", param="response_format")
    rules: list[str] = []
    for number, structure in enumerate(structures):
        trigger = next((trigger for trigger in triggers if trigger and structure.begin.startswith(trigger)), None)
        if trigger is None:
            raise RequestError(
                f"response_format.structures.{number}: {structure.begin!r} does not start with any trigger",
                param="response_format",
            )
        schema = {} if structure.schema is None else structure.schema
        rules.append(writer.rule_until(f"announced_{number}", trigger))
        begin = writer.literal(structure.begin[len(trigger) :])
        rules.append(
            f"tag_{number}: announced_{number} {begin} inside_{number} {writer.literal(structure.end)}\n"
            f"inside_{number}: {writer.inline_json(schema, strict=True)}"
        )
    tags = " | ".join(f"tag_{number}" for number in range(len(structures)))
    return lark(tagged_text(tags, "*", rules))
