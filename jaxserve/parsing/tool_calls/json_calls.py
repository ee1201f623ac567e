"""Formats whose calls are JSON objects with a name and arguments: Qwen 2.5 and Hermes, Llama 3, Mistral."""

from jaxserve.parsing.stream_reader import Parse
from jaxserve.parsing.tool_calls.parser import NoCallError, ToolCallParser


class HermesParser(ToolCallParser):
    """`<tool_call>{"name": NAME, "arguments": {...}}</tool_call>`, repeated; the last end tag may be missing."""

    def _calls(self) -> Parse[None]:
        while (yield from self._reader.until(("<tool_call>",), self._text)) is not None:
            yield from self._attempt("<tool_call>", self._tagged())

    def _tagged(self) -> Parse[None]:
        yield from self._reader.space()
        while True:
            yield from self._json_call()
            yield from self._reader.space()
            if (yield from self._reader.accept("</tool_call>")) is not None or self._reader.text[:1] != "{":
                return


class Llama3Parser(ToolCallParser):
    """`<|python_tag|>{"name": NAME, "parameters": {...}}`, more after `;`; an output may start without the tag."""

    def _calls(self) -> Parse[None]:
        self._text((yield from self._reader.space()))
        if (yield from self._reader.peek()) == "{":
            yield from self._attempt("", self._separated())
        while (yield from self._reader.until(("<|python_tag|>",), self._text)) is not None:
            yield from self._attempt("<|python_tag|>", self._separated())

    def _separated(self) -> Parse[None]:
        while True:
            yield from self._reader.space()
            yield from self._json_call()
            yield from self._reader.space()
            if (yield from self._reader.accept(";")) is None and self._reader.text[:1] != "{":
                return
            yield from self._reader.space()
            if not self._reader.text:
                return


class MistralParser(ToolCallParser):
    """`[TOOL_CALLS][{"name": NAME, "arguments": {...}}, ...]`, or `[TOOL_CALLS]NAME[ARGS]{...}`, repeated."""

    def _calls(self) -> Parse[None]:
        while (yield from self._reader.until(("[TOOL_CALLS]",), self._text)) is not None:
            yield from self._attempt("[TOOL_CALLS]", self._list_or_named())

    def _list_or_named(self) -> Parse[None]:
        reader = self._reader
        yield from reader.space()
        if (yield from reader.accept("[")) is None:
            yield from self._named()
            return
        while True:
            yield from reader.space()
            yield from self._json_call()
            yield from reader.space()
            if (yield from reader.accept(",")) is None:
                break
        yield from reader.accept("]")

    def _named(self) -> Parse[None]:
        name: list[str] = []
        call_id: list[str] = []
        marker = yield from self._reader.until(("[ARGS]", "[CALL_ID]", "{"), name.append)
        if marker == "[CALL_ID]":
            marker = yield from self._reader.until(("[ARGS]",), call_id.append)
        if marker != "[ARGS]":
            raise NoCallError
        self._start("".join(name).strip(), "".join(call_id).strip() or None)
        yield from self._json_arguments()
        self._end()
