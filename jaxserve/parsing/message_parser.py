"""Selects the reasoning and tool-call formats of a model, and combines their parsers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.errors import LaunchError
from jaxserve.parsing.deltas import CallEnd, Content, MessageDelta, Reasoning
from jaxserve.parsing.reasoning.registry import REASONING_FORMATS, ReasoningFormat, detect_reasoning
from jaxserve.parsing.stream_parser import StreamParser
from jaxserve.parsing.tool_calls.registry import TOOL_CALL_FORMATS, ToolCallFormat, detect_tool_calls
from jaxserve.parsing.tool_calls.tool import Tool
from jaxserve.text.chat_template import ChatTemplate

logger = logging.getLogger(__name__)

# Requested from a model whose chat template writes no known format.
_FALLBACK_TOOL_CALLS = "hermes"


@dataclass(frozen=True, kw_only=True)
class ParserSelection:
    """The reasoning and tool-call formats of the served model.

    Attributes:
        reasoning: reasoning format; None if outputs are not searched for thinking.
        tool_calls: tool-call format for requests that declare tools.
    """

    reasoning: ReasoningFormat | None
    tool_calls: ToolCallFormat


def select_parsers(reasoning: str | None, tool_calls: str, template: ChatTemplate) -> ParserSelection:
    """Look up the formats by name; `auto` detects the format that the chat template writes.

    Raises:
        LaunchError: a name is unknown.
    """
    source = template.source or ""
    if reasoning == "auto":
        reasoning = detect_reasoning(source)
        logger.info("reasoning parser: %s, by the chat template", reasoning or "none")
    if tool_calls == "auto":
        detected = detect_tool_calls(source)
        tool_calls = detected or _FALLBACK_TOOL_CALLS
        logger.info(
            "tool-call parser: %s, %s", tool_calls, "by the chat template" if detected else "for want of a better one"
        )
    if reasoning is not None and reasoning.lower() not in REASONING_FORMATS:
        raise LaunchError(f"--reasoning-parser: one of auto, {', '.join(REASONING_FORMATS)}, got {reasoning!r}")
    if tool_calls.lower() not in TOOL_CALL_FORMATS:
        raise LaunchError(f"--tool-call-parser: one of auto, {', '.join(TOOL_CALL_FORMATS)}, got {tool_calls!r}")
    return ParserSelection(
        reasoning=None if reasoning is None else REASONING_FORMATS[reasoning.lower()],
        tool_calls=TOOL_CALL_FORMATS[tool_calls.lower()],
    )


@dataclass(frozen=True, kw_only=True)
class MessageParserConfig:
    """Configuration of the parsers of one request's outputs.

    Attributes:
        reasoning: reasoning format; None for no reasoning parser.
        in_reasoning: whether an output starts inside thinking; None if the prompt does not determine it.
        stream_reasoning: emit thinking as it arrives instead of as one delta at its end.
        tool_calls: tool-call format; None to leave calls in the content.
        tools: tools that may be called.
        single_call: end the message after its first call.
        constrained: whether a grammar determines where thinking may occur.
    """

    reasoning: ReasoningFormat | None = None
    in_reasoning: bool | None = None
    stream_reasoning: bool = True
    tool_calls: ToolCallFormat | None = None
    tools: Sequence[Tool] = ()
    single_call: bool = False
    constrained: bool = False

    def parser(self) -> "MessageParser":
        """Create a parser for one output."""
        return MessageParser(self)


class MessageParser:
    """Parses the text of one output into message deltas: first thinking, then calls in the remaining content.

    Attributes:
        finished: whether the message is complete; later text is ignored.
    """

    def __init__(self, config: MessageParserConfig) -> None:
        self._reasoning = None
        if config.reasoning is not None:
            self._reasoning = config.reasoning.parser(
                config.in_reasoning, keeps_calls=config.tool_calls is not None, constrained=config.constrained
            )
        self._tool_calls = None if config.tool_calls is None else config.tool_calls.parser(config.tools)
        self._stream_reasoning = config.stream_reasoning
        self._single_call = config.single_call
        self._held_reasoning = ""
        self.finished = False

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside thinking."""
        return self._reasoning is not None and self._reasoning.thinking

    def push(self, text: str) -> list[MessageDelta]:
        """Add text and return the deltas that are now certain."""
        deltas = _push(self._reasoning, text)
        return self._end_after_call(self._hold_reasoning(self._find_calls(deltas)))

    def finish(self, *, cut_off: bool = False) -> list[MessageDelta]:
        """End the output and return the remaining deltas; see `StreamParser.finish`."""
        deltas = [] if self._reasoning is None else self._reasoning.finish(cut_off=cut_off)
        deltas = self._find_calls(deltas)
        if self._tool_calls is not None:
            deltas += self._tool_calls.finish(cut_off=cut_off)
        deltas = self._hold_reasoning(deltas)
        if self._held_reasoning:
            deltas.append(Reasoning(self._held_reasoning))
        return self._end_after_call(deltas)

    def _find_calls(self, deltas: list[MessageDelta]) -> list[MessageDelta]:
        if self._tool_calls is None:
            return deltas
        out: list[MessageDelta] = []
        for delta in deltas:
            out += self._tool_calls.push(delta.text) if isinstance(delta, Content) else [delta]
        return out

    def _hold_reasoning(self, deltas: list[MessageDelta]) -> list[MessageDelta]:
        if self._stream_reasoning:
            return deltas
        out: list[MessageDelta] = []
        for delta in deltas:
            if isinstance(delta, Reasoning):
                self._held_reasoning += delta.text
                continue
            if self._held_reasoning:
                out.append(Reasoning(self._held_reasoning))
                self._held_reasoning = ""
            out.append(delta)
        return out

    def _end_after_call(self, deltas: list[MessageDelta]) -> list[MessageDelta]:
        if self.finished:
            return []
        for index, delta in enumerate(deltas):
            if self._single_call and isinstance(delta, CallEnd):
                self.finished = True
                return deltas[: index + 1]
        return deltas


def _push(parser: StreamParser | None, text: str) -> list[MessageDelta]:
    if parser is None:
        return [Content(text)] if text else []
    return parser.push(text)
