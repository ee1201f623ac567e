"""Reasoning format with a separate channel for thinking (harmony, gpt-oss)."""

from dataclasses import dataclass

from jaxserve.parsing.harmony import CALL, CHANNEL, END, ENDS, MARKERS, MESSAGE, START, Header, read_header
from jaxserve.parsing.stream_parser import StreamParser
from jaxserve.parsing.stream_reader import Parse
from jaxserve.structured.grammar import GrammarPrefix, GrammarWriter

# Start of the thinking and of the answer in an output from which the markers were stripped.
_BARE_ANALYSIS, _BARE_FINAL = "analysis", "assistantfinal"


@dataclass(frozen=True)
class Channels:
    """Analysis is thinking, final and commentary are content, and a message to a tool is passed on unchanged."""

    markers: tuple[str, ...] = MARKERS
    force_reasoning: bool = False
    allows_multiple: bool = True
    early_end_markers: tuple[str, ...] = ()
    start: str = f"{CHANNEL}analysis{MESSAGE}"
    end: str = END

    def end_marker(self, *, calls: bool) -> str:
        """See `ReasoningFormat`."""
        # The next message is started as well, because the model could start thinking again otherwise.
        return f"{END}{START}assistant{CHANNEL}" + ("commentary to=functions." if calls else f"final{MESSAGE}")

    def starts_in_reasoning(self, prompt: str) -> bool | None:
        """See `ReasoningFormat`."""
        return prompt.endswith(self.start) or None

    def continues_in_reasoning(self, message: str) -> bool | None:
        """Return None, because templates close the channel of the message that is continued."""
        return None

    def parser(self, in_reasoning: bool | None, *, keeps_calls: bool, constrained: bool) -> "ChannelsParser":
        """See `ReasoningFormat`."""
        return ChannelsParser(in_reasoning=bool(in_reasoning), keeps_calls=keeps_calls)

    def grammar(self, writer: GrammarWriter, in_reasoning: bool | None, *, calls: bool) -> GrammarPrefix:
        """See `ReasoningFormat`."""
        channel, message, start = (writer.literal(marker) for marker in (CHANNEL, MESSAGE, START))
        text = f'thinking {start} "assistant"'
        more = f'({channel} "analysis" {message} {text})*'
        final = "" if calls else f'{channel} "final" {message}'
        return GrammarPrefix(
            " ".join((text if in_reasoning else "", more, final)), (writer.rule_until("thinking", END),)
        )


class ChannelsParser(StreamParser):
    """Splits one output at its channels."""

    def __init__(self, *, in_reasoning: bool, keeps_calls: bool) -> None:
        super().__init__()
        self._keeps_calls = keeps_calls
        self._in_reasoning = in_reasoning
        self.thinking = in_reasoning

    def _parse(self) -> Parse[None]:
        reader = self._reader
        marker: str | None = None
        if self._in_reasoning:
            marker = yield from reader.until((*ENDS, START, CHANNEL), self._reasoning)
            self.thinking = False
        elif (yield from reader.accept(_BARE_ANALYSIS)) is not None:
            yield from self._without_markers()
            return
        while True:
            if marker not in (START, CHANNEL):
                marker = yield from reader.until((START, CHANNEL), self._content)
            if marker is None:
                return
            header = yield from read_header(reader, marker)
            marker = yield from self._message(header)

    def _message(self, header: Header) -> Parse[str | None]:
        """Read a message's text and return the marker that ended it."""
        reader = self._reader
        if not header.complete:
            return None
        if header.recipient and self._keeps_calls:
            self._content(header.raw)
            marker = yield from reader.until((*ENDS, START, CHANNEL), self._content)
            if marker is not None or not self._cut_off:
                self._content(CALL)
            return marker
        emit = {"analysis": self._reasoning, "final": self._content, "commentary": self._content}.get(header.channel)
        if header.recipient:
            emit = self._content
        self.thinking = emit == self._reasoning
        marker = yield from reader.until((*ENDS, START, CHANNEL), emit or (lambda _: None))
        self.thinking = False
        return marker

    def _without_markers(self) -> Parse[None]:
        held: list[str] = []
        if (yield from self._reader.until((_BARE_FINAL,), held.append)) is None:
            self._content(_BARE_ANALYSIS + "".join(held))
            return
        self._reasoning("".join(held))
        yield from self._reader.rest(self._content)
