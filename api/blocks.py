"""A message as blocks, one after the other: what the Responses and the Messages protocol stream."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from jaxserve.parsing.deltas import CallArguments, CallEnd, CallFailed, CallStart, Content, MessageDelta, Reasoning


class BlockKind(Enum):
    """What a block holds."""

    REASONING = auto()
    TEXT = auto()
    CALL = auto()


@dataclass
class Block:
    """One block.

    Attributes:
        index: counts from 0.
        kind: what it holds.
        text: so far; a call's arguments.
        name, call_id: name and id of a call.
        failed: the call turned out to be none.
    """

    index: int
    kind: BlockKind
    text: str = ""
    name: str = ""
    call_id: str | None = None
    failed: bool = False


class Phase(Enum):
    """Where in its life a block is."""

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
    """Pieces to blocks.

    Attributes:
        blocks: all so far.
    """

    blocks: list[Block] = field(default_factory=list[Block])
    _open: Block | None = None

    def add(self, message_deltas: Iterable[MessageDelta]) -> Iterator[BlockEvent]:
        """Events of new message deltas, in order."""
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
