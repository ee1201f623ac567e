"""Grammars of tool calls, reasoning and schemas: random outputs that they allow are valid and can be parsed."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from llguidance import LLTokenizer

from api.completions.schemas import CompletionRequest
from api.requests.constraints import read_constraint
from api.requests.schemas import JsonSchemaFormat, ResponseFormat, TagStructure
from jaxserve.errors import RequestError
from jaxserve.parsing.message import Message
from jaxserve.parsing.message_parser import MessageParserConfig
from jaxserve.parsing.reasoning.registry import REASONING_FORMATS
from jaxserve.parsing.tool_calls.registry import TOOL_CALL_FORMATS
from jaxserve.parsing.tool_calls.tool import Tool
from jaxserve.request import GrammarTokenizer
from jaxserve.structured.compiler import GrammarError, compile_grammar, load_tokenizer
from jaxserve.structured.grammar import GrammarPart, GrammarPrefix, GrammarWriter, JsonStyle, whole
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tokenizer import load_tokenizer as load_text_tokenizer
from tests.support.tiny import EOS, write_tokenizer
from tests.support.transcripts import REASONING_WRITERS

SPECIAL = (
    "<think>",
    "</think>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|start|>",
    "[TOOL_CALLS]",
    "[THINK]",
    "[/THINK]",
    "◁think▷",
    "◁/think▷",
)
TOOLS = (
    Tool(
        name="get_weather",
        parameters={
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "unit": {"type": "string", "enum": ["c", "f"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
        strict=True,
    ),
    Tool(name="stop_all", parameters={"type": "object", "properties": {}, "additionalProperties": False}),
)


class Case:
    """A byte tokenizer with some families' special tokens, for text and for grammars."""

    def __init__(self, folder: Path, special: Sequence[str] = SPECIAL) -> None:
        write_tokenizer(folder)
        text: Tokenizer = load_text_tokenizer(folder)
        text._tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        self.text = Tokenizer(text._tokenizer)
        self.vocab_size = self.text.vocab_size
        for_grammars: GrammarTokenizer = self.text.for_grammars(self.vocab_size, [EOS])
        self.grammars: LLTokenizer = load_tokenizer(for_grammars)
        self.writer = GrammarWriter(self.text, JsonStyle())

    def walk(self, grammar: str, seed: int, limit: int = 2000) -> str | None:
        """Return a random output that the grammar allows, or None if it does not end within `limit` tokens."""
        rng = random.Random(seed)
        matcher = compile_grammar(self.grammars, grammar)
        ids: list[int] = []
        while not matcher.is_stopped() and len(ids) < limit:
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(bits, bitorder="little").nonzero()[0].tolist()
            # Tokens that can end something are preferred, or a text would hardly ever end.
            ends = [token for token in allowed if token >= 256 or token in b'"}])<|']
            token = rng.choice(ends if ends and rng.random() < 0.5 else allowed)
            assert matcher.consume_token(token), matcher.get_error()
            ids.append(token)
        if not matcher.is_stopped():
            return None
        assert not matcher.is_error(), matcher.get_error()
        return self.text.decode([token for token in ids if token != EOS])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("tokenizer"))


def walks(case: Case, grammar: str, count: int = 12) -> list[str]:
    texts = [text for seed in range(count) if (text := case.walk(grammar, seed)) is not None]
    assert len(texts) > count // 3
    return texts


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", TOOL_CALL_FORMATS)
def test_forced_calls_are_read_by_their_own_parser(case: Case, name: str, parallel: bool) -> None:
    format = TOOL_CALL_FORMATS[name]
    grammar = whole([(GrammarPrefix(), format.syntax.calls(case.writer, TOOLS, parallel=parallel))])
    counts = set()
    for text in walks(case, grammar):
        parser = MessageParserConfig(tool_calls=format, tools=TOOLS).parser()
        message = Message().add(parser.push(text)).add(parser.finish())
        assert message.content == ""
        counts.add(len(message.calls))
        for call in message.calls.values():
            tool = next(tool for tool in TOOLS if tool.name == call.name)
            jsonschema_rs.validate(dict(tool.parameters), json.loads(call.arguments))
    assert counts == {1} if not parallel or name == "gpt-oss" else max(counts) > 1


@pytest.mark.parametrize("name", TOOL_CALL_FORMATS)
def test_strict_tools_hold_wherever_a_call_begins(case: Case, name: str) -> None:
    format = TOOL_CALL_FORMATS[name]
    grammar = whole([(GrammarPrefix(), format.syntax.text_and_calls(case.writer, TOOLS, parallel=True))])
    matcher = compile_grammar(case.grammars, grammar)
    text = "It is nice. " if name != "gpt-oss" else "<|channel|>final<|message|>It is nice."
    assert matcher.try_consume_tokens(case.grammars.tokenize_str(text, parse_special=True)) == len(
        case.grammars.tokenize_str(text, parse_special=True)
    )
    assert matcher.is_accepting()
    called = whole([(GrammarPrefix(), format.syntax.calls(case.writer, TOOLS, parallel=False))])
    for output in walks(case, called, 4):
        fresh = compile_grammar(case.grammars, grammar)
        ids = case.grammars.tokenize_str(output, parse_special=True)
        assert fresh.try_consume_tokens(ids) == len(ids), output
        assert fresh.is_accepting()
        wrong = output.replace("get_weather", "get_wethr").replace("stop_all", "stopp")
        ids = case.grammars.tokenize_str(wrong, parse_special=True)
        assert compile_grammar(case.grammars, grammar).try_consume_tokens(ids) < len(ids)


@pytest.mark.parametrize("in_reasoning", [None, True, False])
@pytest.mark.parametrize("name", REASONING_FORMATS)
def test_a_grammar_holds_after_the_thinking(case: Case, name: str, in_reasoning: bool | None) -> None:
    format = REASONING_FORMATS[name]
    part = GrammarPart({"lark_grammar": 'start: "yes" | "no"'})
    grammar = whole([(format.grammar(case.writer, in_reasoning, calls=False), part)])
    contents = set()
    for text in walks(case, grammar, 30):
        parser = MessageParserConfig(reasoning=format, in_reasoning=in_reasoning).parser()
        contents.add(Message().add(parser.push(text)).add(parser.finish()).content)
    assert contents == {"yes", "no"}


@pytest.mark.parametrize("name", REASONING_FORMATS)
def test_markers_that_are_ordinary_text(name: str, tmp_path: Path) -> None:
    """A grammar also holds after the thinking if the tokenizer has no tokens for the markers."""
    plain = Case(tmp_path, special=())
    format = REASONING_FORMATS[name]
    part = GrammarPart({"lark_grammar": 'start: "yes" | "no"'})
    grammar = whole([(format.grammar(plain.writer, True, calls=False), part)])
    for content, accepted in (("yes", True), ("maybe", False)):
        text = REASONING_WRITERS[name]("é < b", content)
        text = text.removeprefix(format.start)
        ids = plain.grammars.tokenize_str(text)
        matcher = compile_grammar(plain.grammars, grammar)
        assert (matcher.try_consume_tokens(ids) == len(ids)) is accepted
    # The grammar does not offer a tag that the model never learnt.
    assert name == "gpt-oss" or format.force_reasoning or not format.grammar(plain.writer, None, calls=False).expression


def constraint(case: Case, **fields: Any) -> str:
    part, _ = read_constraint(CompletionRequest(prompt="x", **fields), case.writer)
    assert part is not None
    return whole([(GrammarPrefix(), part)])


def test_what_requests_can_demand(case: Case) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for fields in (
        {"json_schema": json.dumps(schema)},
        {"json_schema": schema},
        {"response_format": ResponseFormat("json_schema", JsonSchemaFormat(schema, strict=True))},
        {"response_format": ResponseFormat("json_schema", JsonSchemaFormat(schema))},
    ):
        for text in walks(case, constraint(case, **fields), 6):
            assert isinstance(json.loads(text)["a"], int)
    for text in walks(case, constraint(case, response_format=ResponseFormat("json_object")), 6):
        assert isinstance(json.loads(text), dict)
    for text in walks(case, constraint(case, regex=r"[a-c]{2}/\d"), 6):
        assert text[2] == "/"
    for pattern, text in ((r"a\\/b", "a\\/b"), (r"a\/b", "a/b"), ("[/]x\n", "/x\n")):
        ids = case.grammars.tokenize_str(text)
        assert compile_grammar(case.grammars, constraint(case, regex=pattern)).try_consume_tokens(ids) == len(ids)
    for text in walks(case, constraint(case, ebnf='root ::= item ("," item)*\nitem ::= "x" | "y"'), 6):
        assert set(text) <= set("xy,")


def test_structural_tags(case: Case) -> None:
    tags = [TagStructure("<f=a>", "</f>", {"type": "integer"}), TagStructure("<f=b>", "</f>", {"type": "boolean"})]
    grammar = constraint(case, response_format=ResponseFormat("structural_tag", structures=tags, triggers=["<f="]))
    for text, accepted in (
        ("hello", True),
        ("so <f=a>12</f> and <f=b>true</f>.", True),
        ("<f=a>true</f>", False),
        ("<f=c>", False),
    ):
        ids = case.grammars.tokenize_str(text)
        matcher = compile_grammar(case.grammars, grammar)
        assert (matcher.try_consume_tokens(ids) == len(ids)) is accepted, text


def test_white_space_is_bounded(case: Case) -> None:
    compact = GrammarWriter(case.text, JsonStyle(whitespace=None))
    schema = {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "minItems": 3, "maxItems": 3}
    for text in walks(case, whole([(GrammarPrefix(), compact.json_schema(schema, strict=True))]), 6):
        assert len(text) == 7
    ids = case.grammars.tokenize_str("[" + " " * 80)
    matcher = compile_grammar(case.grammars, whole([(GrammarPrefix(), case.writer.json_schema(schema, strict=True))]))
    assert 60 < matcher.try_consume_tokens(ids) < len(ids)


def test_strict_refuses_what_cannot_be_enforced(case: Case) -> None:
    schema = {"type": "object", "not": {"required": ["a"]}}
    compile_grammar(case.grammars, whole([(GrammarPrefix(), case.writer.json_schema(schema, strict=False))]))
    with pytest.raises(GrammarError, match="not"):
        compile_grammar(case.grammars, whole([(GrammarPrefix(), case.writer.json_schema(schema, strict=True))]))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "at most one"),
        ({"regex": "a", "response_format": ResponseFormat("json_object")}, "at most one"),
        ({"ebnf": "root ::= other"}, "other"),
        ({"ebnf": "nonsense"}, "ebnf"),
        ({"ebnf": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "nested too deeply"),
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": "3"}, "JSON object"),
        ({"response_format": ResponseFormat("json_schema")}, "schema is missing"),
        ({"response_format": ResponseFormat("structural_tag")}, "must not be empty"),
        (
            {"response_format": ResponseFormat("structural_tag", structures=[TagStructure("<a>", "")], triggers=["b"])},
            "does not start with any trigger",
        ),
    ],
)  # fmt: skip
def test_demands_that_are_refused(case: Case, fields: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        constraint(case, **fields)


@pytest.mark.parametrize(
    ("name", "parameters", "strict"),
    [
        ("pythonic", {"properties": {"class": {}}}, False),
        ("pythonic", {"properties": {"a-b": {}}}, False),
        ("glm45", {"properties": {"a": {"type": "string", "pattern": "^[a-z]+$"}}}, True),
        ("qwen3_coder", {"properties": {"a": {"type": "string", "format": "date"}}}, True),
    ],
)
def test_tools_that_a_format_cannot_promise(case: Case, name: str, parameters: dict[str, Any], strict: bool) -> None:
    tool = Tool(name="f", parameters=parameters, strict=strict)
    with pytest.raises(RequestError, match="this model writes"):
        TOOL_CALL_FORMATS[name].syntax.calls(case.writer, [tool], parallel=True)


ODD = {
    "type": "object",
    "properties": {
        "ref": {"$ref": "#/$defs/inner"},
        "const": {"const": "x"},
        "enum": {"enum": [1, 2]},
        "words": {"type": "string", "enum": ["a b", "c"]},
        "bad enum": {"type": "string", "enum": 5},
        "mixed": {"type": "array", "items": {"enum": [True, None, "t"]}, "maxItems": 2},
    },
    "required": ["ref", "const", "enum", "words", "mixed", ["nonsense"]],
    "$defs": {"inner": {"type": "object", "properties": {"k": {"type": "integer"}}, "additionalProperties": False}},
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", ["glm45", "hermes", "pythonic", "qwen3_coder"])
def test_arguments_of_odd_types(case: Case, name: str) -> None:
    """The parser reads what the grammar allows, with the types of the schema."""
    properties = {key: value for key, value in ODD["properties"].items() if " " not in key or name != "pythonic"}  # type: ignore[attr-defined]
    tool = Tool(name="f", parameters={**ODD, "properties": properties})
    format = TOOL_CALL_FORMATS[name]
    if name == "hermes":
        tool = Tool(
            name="f", parameters={**ODD, "properties": properties, "required": ["ref", "const", "enum", "mixed"]}
        )
        properties.pop("bad enum")
    grammar = whole([(GrammarPrefix(), format.syntax.calls(case.writer, [tool], parallel=False))])
    for text in walks(case, grammar, 8):
        parser = MessageParserConfig(tool_calls=format, tools=[tool]).parser()
        [call] = Message().add([*parser.push(text), *parser.finish()]).calls.values()
        arguments = json.loads(call.arguments)
        assert isinstance(arguments["ref"], dict)
        assert arguments["const"] == "x"
        assert arguments["enum"] in (1, 2)
        assert set(arguments["mixed"]) <= {True, None, "t"}


def test_text_cannot_pretend_to_be_a_strict_call(case: Case) -> None:
    for name, text in (
        ("llama3", ' {"name": "get_weather", "parameters": {"zzz": 1}}'),
        ("pythonic", "\n[get_weather(zzz=1)]"),
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"zzz": 1}}</tool_call>'),
    ):
        format = TOOL_CALL_FORMATS[name]
        grammar = whole([(GrammarPrefix(), format.syntax.text_and_calls(case.writer, TOOLS, parallel=True))])
        ids = case.grammars.tokenize_str(text)
        assert compile_grammar(case.grammars, grammar).try_consume_tokens(ids) < len(ids)
    format = TOOL_CALL_FORMATS["qwen3_coder"]
    parser = MessageParserConfig(tool_calls=format, tools=TOOLS).parser()
    assert not Message().add([*parser.push("<function=get_weather></function>"), *parser.finish()]).calls
