"""Parsers of model output give the same message for any split of a text as for the whole text, and lose nothing."""

import json
import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.parsing.deltas import CallArguments, CallEnd, CallStart, MessageDelta
from jaxserve.parsing.harmony import MARKERS
from jaxserve.parsing.json_scanner import JsonScanner
from jaxserve.parsing.message import Message
from jaxserve.parsing.message_parser import MessageParserConfig
from jaxserve.parsing.reasoning.registry import REASONING_FORMATS
from jaxserve.parsing.tool_calls.registry import TOOL_CALL_FORMATS
from tests.support.transcripts import CALL_WRITERS, REASONING_WRITERS, TOOLS, WrittenCall

WORDS = st.text(alphabet=st.sampled_from("ab <>[]{}|/\\'\"\n,:;é漢😀▁｜◁▷"), max_size=30)
TEXT = WORDS | st.text(max_size=20)
CUTS = st.lists(st.integers(0, 400), max_size=12)


def cut(text: str, cuts: Iterable[int]) -> list[str]:
    ends = sorted({min(position, len(text)) for position in cuts} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def read(config: MessageParserConfig, parts: Iterable[str]) -> list[MessageDelta]:
    parser = config.parser()
    pieces = [piece for part in parts for piece in parser.push(part)]
    return pieces + parser.finish()


def is_plain(text: str, markers: Iterable[str]) -> bool:
    """Whether a text contains no marker, and no part of a marker at its edges."""
    return not any(
        marker in text
        or any(text.endswith(marker[:size]) or text.startswith(marker[-size:]) for size in range(1, len(marker)))
        for marker in markers
    )


@pytest.mark.parametrize("name", REASONING_FORMATS)
@given(data=st.data())
def test_thinking_is_separated_from_content(name: str, data: st.DataObject) -> None:
    format = REASONING_FORMATS[name]
    plain = TEXT.filter(lambda text: is_plain(text, format.markers))
    reasoning = data.draw(plain.filter(lambda text: not text.startswith((" ", "\n")) or name == "gpt-oss"))
    content = data.draw(plain)
    text = REASONING_WRITERS[name](reasoning, content)
    pieces = read(MessageParserConfig(reasoning=format), cut(text, data.draw(CUTS)))
    message = Message().add(pieces)
    assert (message.reasoning, message.content) == (reasoning, content)


@pytest.mark.parametrize("name", REASONING_FORMATS)
@given(data=st.data())
def test_any_cutting_of_any_text_gives_the_same_thinking(name: str, data: st.DataObject) -> None:
    format = REASONING_FORMATS[name]
    bits = st.sampled_from(format.markers) | TEXT | st.sampled_from([marker[:3] for marker in format.markers])
    text = "".join(data.draw(st.lists(bits, max_size=8)))
    in_reasoning = data.draw(st.sampled_from([None, True, False]))
    wanted = MessageParserConfig(reasoning=format, in_reasoning=in_reasoning, stream_reasoning=data.draw(st.booleans()))
    whole = Message().add(read(wanted, [text]))
    assert Message().add(read(wanted, cut(text, data.draw(CUTS)))) == whole
    if name != "gpt-oss":
        # Text passes through: only tags, and space before a repeated tag, are removed.
        passed = "".join(piece.text for piece in read(wanted, [text]))  # type: ignore[union-attr]
        gone = str.maketrans(dict.fromkeys(f"{format.start}{format.end} \n"))
        assert passed.translate(gone) == text.translate(gone)
        if format.start not in text and format.end not in text:
            assert passed == text


@pytest.mark.parametrize("name", REASONING_FORMATS)
@given(text=TEXT, cuts=CUTS)
def test_text_without_markers_passes_unchanged(name: str, text: str, cuts: list[int]) -> None:
    format = REASONING_FORMATS[name]
    message = Message().add(read(MessageParserConfig(reasoning=format, in_reasoning=False), cut(text, cuts)))
    if all(marker not in text for marker in format.markers) and not text.startswith("analysis"):
        assert (message.content, message.reasoning) == (text, "")
    in_reasoning = Message().add(read(MessageParserConfig(reasoning=format, in_reasoning=True), cut(text, cuts)))
    if all(marker not in text for marker in format.markers):
        assert (in_reasoning.content, in_reasoning.reasoning) == ("", text)


STRINGS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<>\r"), max_size=12).map(str.strip)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "city": STRINGS,
    "days": st.integers(-(10**6), 10**6),
    "share": st.floats(allow_nan=False, allow_infinity=False),
    "metric": st.booleans(),
    "places": st.lists(STRINGS, max_size=3),
    "options": st.dictionaries(STRINGS, st.integers() | STRINGS | st.none(), max_size=3),
}
ARGUMENTS = st.fixed_dictionaries({"city": VALUES["city"]}, optional={k: v for k, v in VALUES.items() if k != "city"})
CALLS = st.lists(
    ARGUMENTS.map(lambda arguments: WrittenCall("get_weather", arguments)) | st.just(WrittenCall("stop_all", {})),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize(("name", "write"), CALL_WRITERS, ids=[f"{n}-{w.__name__}" for n, w in CALL_WRITERS])
@given(calls=CALLS, cuts=CUTS, before=st.sampled_from(["", "Let me see.", "é漢 😀"]))
def test_calls_are_read_as_they_were_meant(
    name: str, write: Any, calls: list[WrittenCall], cuts: list[int], before: str
) -> None:
    if name in ("llama3", "pythonic"):
        before = ""  # in these formats, calls begin the output
    config = MessageParserConfig(tool_calls=TOOL_CALL_FORMATS[name], tools=TOOLS)
    pieces = read(config, cut(f"{before}\n{write(calls)}" if before else write(calls), cuts))
    message = Message().add(pieces)
    assert [(call.name, json.loads(call.arguments)) for call in message.calls.values()] == calls
    assert all(call.complete for call in message.calls.values())
    assert message.content == before
    for index in range(len(calls)):
        own = [type(piece) for piece in pieces if not isinstance(piece, str) and getattr(piece, "call", None) == index]
        assert own[0] is CallStart
        assert own[-1] is CallEnd
        assert set(own[1:-1]) == {CallArguments}


@pytest.mark.parametrize(("name", "write"), CALL_WRITERS, ids=[f"{n}-{w.__name__}" for n, w in CALL_WRITERS])
@given(data=st.data())
def test_any_cutting_of_broken_calls_gives_the_same(name: str, write: Any, data: st.DataObject) -> None:
    """Transcripts with parts removed, doubled or inserted raise no exception, and text that is no call is content."""
    text = write(data.draw(CALLS))
    for _ in range(data.draw(st.integers(0, 3))):
        at, size = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 12))
        put = data.draw(st.sampled_from(["", text[at : at + 5], "}", '"', "{", "\n"]) | TEXT)
        text = text[:at] + put + text[at + size :]
    config = MessageParserConfig(tool_calls=TOOL_CALL_FORMATS[name], tools=TOOLS)
    whole = Message().add(read(config, [text]))
    parts = Message().add(read(config, cut(text, data.draw(CUTS))))
    assert parts == whole
    assert all(call.complete for call in whole.calls.values())
    for call in whole.calls.values():
        assert isinstance(json.loads(call.arguments), dict)
    if not whole.calls:
        # These two formats drop the headers and markers of messages that are no calls.
        assert whole.content == text or name in ("pythonic", "gpt-oss")


@pytest.mark.parametrize(("name", "write"), CALL_WRITERS, ids=[f"{n}-{w.__name__}" for n, w in CALL_WRITERS])
@given(calls=CALLS, size=st.integers(0, 400), cuts=CUTS)
def test_a_call_that_is_cut_off_has_a_beginning(
    name: str, write: Any, calls: list[WrittenCall], size: int, cuts: list[int]
) -> None:
    """The arguments parsed from a truncated call are a prefix of the whole call's; nothing is emitted twice."""
    config = MessageParserConfig(tool_calls=TOOL_CALL_FORMATS[name], tools=TOOLS)
    whole = Message().add(read(config, [write(calls)]))
    parser = config.parser()
    pieces = [piece for part in cut(write(calls)[:size], cuts) for piece in parser.push(part)]
    message = Message().add([*pieces, *parser.finish(cut_off=True)])
    for index, call in message.calls.items():
        assert call.name == whole.calls[index].name
        expected = whole.calls[index].arguments
        if call.complete:
            assert call.arguments == expected
        else:
            # In formats without quotes, a line break or the beginning of an end tag may be text as well.
            assert expected.startswith(re.sub(r"(\\n)?(</?[a-z_]*)?$", "", call.arguments))
    if any(not call.complete for call in message.calls.values()):
        assert message.content == ""


@pytest.mark.parametrize("name", TOOL_CALL_FORMATS)
@given(text=TEXT, cuts=CUTS)
def test_text_without_calls_is_content(name: str, text: str, cuts: list[int]) -> None:
    config = MessageParserConfig(tool_calls=TOOL_CALL_FORMATS[name], tools=TOOLS)
    assert Message().add(read(config, cut(text, cuts))) == Message(content=text)


@given(calls=CALLS, reasoning=TEXT.filter(lambda text: is_plain(text, MARKERS)), cuts=CUTS)
def test_harmony_reads_thinking_and_calls_together(calls: list[WrittenCall], reasoning: str, cuts: list[int]) -> None:
    write = dict(CALL_WRITERS)["gpt-oss"]
    text = f"<|channel|>analysis<|message|>{reasoning}<|end|>{write(calls)}"
    config = MessageParserConfig(
        reasoning=REASONING_FORMATS["gpt-oss"], tool_calls=TOOL_CALL_FORMATS["gpt-oss"], tools=TOOLS
    )
    message = Message().add(read(config, cut(text, cuts)))
    assert message.reasoning == reasoning
    assert message.content == ""
    assert [(call.name, json.loads(call.arguments)) for call in message.calls.values()] == calls


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(value=JSON, indent=st.sampled_from([None, 2]), ascii_only=st.booleans(), python=st.booleans(), cuts=CUTS)
def test_json_passes_the_scanner(
    value: Any, indent: int | None, ascii_only: bool, python: bool, cuts: list[int]
) -> None:
    """Strict JSON passes unchanged, and a value as Python writes it becomes the same value in JSON."""
    text = repr(value) if python else json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    if python and ("\\x" in text or "\\U" in text):
        return  # JSON has no such escapes
    scanner, out, rest = JsonScanner(), "", ""
    for part in [*cut(text, cuts), ""]:
        rest += part
        new, count = scanner.scan(rest, closed=part == "")
        out, rest = out + new, rest[count:]
    assert scanner.done
    assert not rest
    assert json.loads(out) == value
    if not python:
        assert out == text


@given(text=st.text(alphabet="{}[]\",:\\ntrue1.-e' \n", max_size=40), cuts=CUTS)
def test_what_the_scanner_lets_through_is_json(text: str, cuts: list[int]) -> None:
    def scan(parts: list[str]) -> tuple[bool, str]:
        scanner, out, rest = JsonScanner(), "", ""
        for part in [*parts, ""]:
            rest += part
            new, count = scanner.scan(rest, closed=part == "")
            out, rest = out + new, rest[count:]
        return scanner.done, out if scanner.done else ""

    done, out = scan([text])
    assert scan(cut(text, cuts)) == (done, out)
    if done:
        json.loads(out)


HOSTILE = (
    '<tool_call>{"name": {"a": 1}, "arguments": {}}</tool_call>',
    '<tool_call>{"name": ["f"]}</tool_call>',
    '<tool_call>{"x": ' + "9" * 5000 + ', "name": "stop_all"}</tool_call>',
    '<tool_call>{"x": 1٢, "name": "stop_all"}</tool_call>',
    '<tool_call>{"name": "stop_all", "arguments": {"a": 1٢}}</tool_call>',
    '<tool_call>{"name": "stop_all", "arguments": "' + "[" * 100_000 + '"}</tool_call>',
    '<tool_call>{"name": "stop_all", "arguments": ' + '{"a":' * 5000 + "</tool_call>",
    "<tool_call>" * 20_000,
    "[" * 50_000,
    "[stop_all(a=" + "(" * 5000 + ")]",
    '{"name": "stop_all", "parameters": {"a": "\\ud800"}}',
)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("name", TOOL_CALL_FORMATS)
def test_hostile_output_is_content(name: str, text: str) -> None:
    """Hostile output raises no exception, and parsing takes time linear in the text, not quadratic."""
    message = Message().add(read(MessageParserConfig(tool_calls=TOOL_CALL_FORMATS[name], tools=TOOLS), [text]))
    for call in message.calls.values():
        assert isinstance(json.loads(call.arguments), dict)
