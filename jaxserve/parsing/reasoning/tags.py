"""Thinking between two tags, as most models write it."""

from dataclasses import dataclass

from jaxserve.parsing.stream_parser import StreamParser
from jaxserve.parsing.stream_reader import Parse
from jaxserve.structured.grammar import GrammarPrefix, GrammarWriter


@dataclass(frozen=True, kw_only=True)
class Tags:
    """How a family of models marks its thinking.

    Attributes:
        start, end: the tags.
        interrupts: markers that end the thinking early and belong to what follows.
        force_reasoning: the output starts inside thinking if the prompt's end does not say.
        reopens: an output may think several times.
    """

    start: str = "<think>"
    end: str = "</think>"
    interrupts: tuple[str, ...] = ()
    force_reasoning: bool = False
    reopens: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Text that the parser must see even where it is a special token."""
        return (self.start, self.end, *self.interrupts)

    def closing(self, *, calls: bool) -> str:
        """See `ReasoningFormat`."""
        return self.end

    def inside(self, prompt: str) -> bool | None:
        """Whether an output after this prompt starts inside thinking; None if the prompt's end does not say."""
        tail = prompt.rstrip()
        if tail.endswith(self.end):
            return False
        return True if tail.endswith(self.start) else None

    def inside_continued(self, message: str) -> bool | None:
        """The same for an output that continues a message of the assistant's."""
        start, end = message.rfind(self.start), message.rfind(self.end)
        return None if start == end == -1 else start > end

    def parser(self, inside: bool | None, *, keeps_calls: bool, constrained: bool) -> "TagsParser":
        """See `ReasoningFormat`."""
        return TagsParser(self, inside, constrained=constrained)

    def grammar(self, writer: GrammarWriter, inside: bool | None, *, calls: bool) -> GrammarPrefix:
        """See `ReasoningFormat`."""
        if inside is False:
            return GrammarPrefix()
        rule = writer.rule_until("thinking", self.end)
        if inside or self.force_reasoning:
            return GrammarPrefix("thinking", (rule,))
        if not writer.vocabulary.is_token(self.start):
            # Only a model that has learnt the tag can choose to think; another would be led to it by its first letter.
            return GrammarPrefix()
        return GrammarPrefix(f"({writer.literal(self.start)} thinking)?", (rule,))


class TagsParser(StreamParser):
    """Splits one output at the tags."""

    def __init__(self, tags: Tags, inside: bool | None, *, constrained: bool) -> None:
        super().__init__()
        self._tags = tags
        self._constrained = constrained
        self._inside = inside
        self.thinking = inside if inside is not None else tags.force_reasoning

    def _parse(self) -> Parse[None]:
        reader, tags = self._reader, self._tags
        inside = self._inside
        if inside is None and not tags.force_reasoning and self._constrained:
            inside = (yield from reader.accept(tags.start)) is not None
        elif inside is None:
            inside = tags.force_reasoning or (yield from reader.until((tags.start,), self._content)) is not None
        if inside:
            self.thinking = True
            yield from self._think()
            self.thinking = False
        yield from reader.rest(self._content)

    def _think(self) -> Parse[None]:
        reader, tags = self._reader, self._tags
        # A model repeats the tag that the prompt or itself has written already.
        while True:
            space = yield from reader.space()
            if (yield from reader.accept(tags.start)) is None:
                break
        self._reasoning(space)
        interrupts = () if self._constrained else tags.interrupts
        marker = yield from reader.until((tags.end, *interrupts), self._reasoning)
        if marker is not None and marker != tags.end:
            self._content(marker)
