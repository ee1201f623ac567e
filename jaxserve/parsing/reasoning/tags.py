"""Reasoning format of most models: thinking between two tags."""

from dataclasses import dataclass

from jaxserve.parsing.stream_parser import StreamParser
from jaxserve.parsing.stream_reader import Parse
from jaxserve.structured.grammar import GrammarPrefix, GrammarWriter


@dataclass(frozen=True, kw_only=True)
class Tags:
    """Reasoning format of a model family that writes thinking between two tags.

    Attributes:
        start, end: the tags.
        early_end_markers: markers that end thinking early and are part of the content that follows.
        force_reasoning: whether an output starts inside thinking if the end of the prompt does not determine it.
        allows_multiple: whether an output may contain several thinking sections.
    """

    start: str = "<think>"
    end: str = "</think>"
    early_end_markers: tuple[str, ...] = ()
    force_reasoning: bool = False
    allows_multiple: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Markers that must reach the parser even if they are special tokens."""
        return (self.start, self.end, *self.early_end_markers)

    def end_marker(self, *, calls: bool) -> str:
        """See `ReasoningFormat`."""
        return self.end

    def starts_in_reasoning(self, prompt: str) -> bool | None:
        """See `ReasoningFormat`."""
        tail = prompt.rstrip()
        if tail.endswith(self.end):
            return False
        return True if tail.endswith(self.start) else None

    def continues_in_reasoning(self, message: str) -> bool | None:
        """See `ReasoningFormat`."""
        start, end = message.rfind(self.start), message.rfind(self.end)
        return None if start == end == -1 else start > end

    def parser(self, in_reasoning: bool | None, *, keeps_calls: bool, constrained: bool) -> "TagsParser":
        """See `ReasoningFormat`."""
        return TagsParser(self, in_reasoning, constrained=constrained)

    def grammar(self, writer: GrammarWriter, in_reasoning: bool | None, *, calls: bool) -> GrammarPrefix:
        """See `ReasoningFormat`."""
        if in_reasoning is False:
            return GrammarPrefix()
        rule = writer.rule_until("thinking", self.end)
        if in_reasoning or self.force_reasoning:
            return GrammarPrefix("thinking", (rule,))
        if not writer.vocabulary.is_token(self.start):
            # Without a token for the tag, the model was not trained on it, and the grammar would force it into thinking
            # as soon as it wrote the tag's first character.
            return GrammarPrefix()
        return GrammarPrefix(f"({writer.literal(self.start)} thinking)?", (rule,))


class TagsParser(StreamParser):
    """Splits one output at the tags."""

    def __init__(self, tags: Tags, in_reasoning: bool | None, *, constrained: bool) -> None:
        super().__init__()
        self._tags = tags
        self._constrained = constrained
        self._in_reasoning = in_reasoning
        self.thinking = in_reasoning if in_reasoning is not None else tags.force_reasoning

    def _parse(self) -> Parse[None]:
        reader, tags = self._reader, self._tags
        in_reasoning = self._in_reasoning
        if in_reasoning is None and not tags.force_reasoning and self._constrained:
            in_reasoning = (yield from reader.accept(tags.start)) is not None
        elif in_reasoning is None:
            in_reasoning = tags.force_reasoning or (yield from reader.until((tags.start,), self._content)) is not None
        if in_reasoning:
            self.thinking = True
            yield from self._think()
            self.thinking = False
        yield from reader.rest(self._content)

    def _think(self) -> Parse[None]:
        reader, tags = self._reader, self._tags
        # Models may repeat a start tag that the prompt or they themselves have already written.
        while True:
            space = yield from reader.space()
            if (yield from reader.accept(tags.start)) is None:
                break
        self._reasoning(space)
        early_end_markers = () if self._constrained else tags.early_end_markers
        marker = yield from reader.until((tags.end, *early_end_markers), self._reasoning)
        if marker is not None and marker != tags.end:
            self._content(marker)
