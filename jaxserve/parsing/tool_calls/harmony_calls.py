"""Tool calls of gpt-oss: a call is a message to `functions.NAME`."""

from collections.abc import Iterable, Sequence

from jaxserve.parsing.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, Header, read_header
from jaxserve.parsing.stream_reader import Parse
from jaxserve.parsing.tool_calls.parser import NoCallError, ToolCallParser
from jaxserve.parsing.tool_calls.syntax import JsonArguments
from jaxserve.parsing.tool_calls.tool import Tool
from jaxserve.structured.grammar import ANY_TEXT, GrammarPart, GrammarWriter, lark


class HarmonyParser(ToolCallParser):
    """`<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>`."""

    def _calls(self) -> Parse[None]:
        while (marker := (yield from self._reader.until((START, CHANNEL), self._text))) is not None:
            yield from self._attempt(marker, self._message(marker))

    def _message(self, marker: str) -> Parse[None]:
        header = yield from read_header(self._reader, marker)
        if header.recipient:
            if not (header.complete and header.recipient.startswith("functions.")):
                raise NoCallError
            yield from self._call(header)
        elif header.complete:
            # No reasoning parser has split off this message, so its text is content.
            yield from self._reader.until((END, RETURN), self._text)

    def _call(self, header: Header) -> Parse[None]:
        self._start(header.recipient.removeprefix("functions."))
        yield from self._json_arguments()
        yield from self._reader.space()
        yield from self._reader.accept(CALL, END, RETURN)
        self._end()


class HarmonySyntax:
    """Grammars of calls as messages. A call ends the turn, so an output has at most one."""

    def calls(self, writer: GrammarWriter, tools: Sequence[Tool], *, parallel: bool) -> GrammarPart:
        """See `CallSyntax`."""
        return lark("\n".join((f"start: {writer.literal(CHANNEL)} call", *self._rules(writer, tools))))

    def text_and_calls(
        self,
        writer: GrammarWriter,
        tools: Sequence[Tool],
        *,
        parallel: bool,
    ) -> GrammarPart:
        """See `CallSyntax`."""
        channel, message, start = (writer.literal(marker) for marker in (CHANNEL, MESSAGE, START))
        header = f"{channel} /analysis|commentary|final/ {message}"
        rules = (
            f'start: ({header} other {start} "assistant")* ({channel} call | {header} LAST)',
            writer.rule_until("other", END),
            f"LAST: {ANY_TEXT}",
        )
        return lark("\n".join((*rules, *self._rules(writer, tools))))

    def _rules(self, writer: GrammarWriter, tools: Sequence[Tool]) -> Iterable[str]:
        constrain, message = writer.literal(CONSTRAIN), writer.literal(MESSAGE)
        yield "call: " + " | ".join(f"call_{number}" for number in range(len(tools)))
        for number, tool in enumerate(tools):
            header = f'{writer.literal(f"commentary to=functions.{tool.name} ")} {constrain} "json" {message}'
            yield f"call_{number}: {header} arguments_{number}"
            yield from JsonArguments().rules(writer, tool, f"arguments_{number}")
