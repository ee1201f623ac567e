"""A message as a sequence of content blocks, which the Responses and Messages protocols stream."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from jaxserve.parsing.deltas import CallArguments, CallEnd, CallFailed, CallStart, Content, MessageDelta, Reasoning


class BlockKind(Enum):
    """The kind of content in a block."""

    REASONING = auto()
    TEXT = auto()
    CALL = auto()


@dataclass
class Block:
    """One content block.

    Attributes:
        index: index of the block in its message.
        kind: kind of content.
        text: the text so far; for a call, its arguments.
        name: function name of a call.
        call_id: the model's own id of a call; None if it gave none.
        failed: the text turned out not to be a call.
    """

    index: int
    kind: BlockKind
    text: str = ""
    name: str = ""
    call_id: str | None = None
    failed: bool = False


class Phase(Enum):
    """The phase of a block's stream."""

    START = auto()
    DELTA = auto()
    STOP = auto()


class BlockEvent(NamedTuple):
    """A block begins, grows by `text`, or ends."""

    phase: Phase
    block: Block
    text: str = ""


@dataclass
class BlockStream:
    """Converts message deltas to block events.

    Attributes:
        blocks: all blocks so far.
    """

    blocks: list[Block] = field(default_factory=list[Block])
    _open: Block | None = None

    def add(self, message_deltas: Iterable[MessageDelta]) -> Iterator[BlockEvent]:
        """Yield the events of new message deltas, in order."""
        for part in message_deltas:
            match part:
                case Reasoning(text=text):
                    yield from self._grow(BlockKind.REASONING, text)
                case Content(text=text):
                    yield from self._grow(BlockKind.TEXT, text)
                case CallStart(name=name, id=own):
                    yield from self._begin(BlockKind.CALL, name, own)
                case CallArguments(text=text):
                    yield from self._grow(BlockKind.CALL, text)
                case CallEnd():
                    yield from self.end()
                case CallFailed(text=text):
                    if self._open is not None:
                        self._open.failed = True
                    yield from self._grow(BlockKind.TEXT, text)

    def end(self) -> Iterator[BlockEvent]:
        """End the open block, if there is one."""
        if self._open is not None:
            block, self._open = self._open, None
            yield BlockEvent(Phase.STOP, block)

    def _grow(self, kind: BlockKind, text: str) -> Iterator[BlockEvent]:
        if self._open is None or self._open.kind is not kind:
            yield from self._begin(kind)
        assert self._open is not None
        self._open.text += text
        yield BlockEvent(Phase.DELTA, self._open, text)

    def _begin(self, kind: BlockKind, name: str = "", call_id: str | None = None) -> Iterator[BlockEvent]:
        yield from self.end()
        self._open = Block(len(self.blocks), kind, name=name, call_id=call_id)
        self.blocks.append(self._open)
        yield BlockEvent(Phase.START, self._open)
