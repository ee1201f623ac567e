"""The deltas of an assistant message, in the order of its text."""

from typing import NamedTuple, TypeAlias


class Reasoning(NamedTuple):
    """Text of the model's thinking."""

    text: str


class Content(NamedTuple):
    """Text for the user."""

    text: str


class CallStart(NamedTuple):
    """The start of a tool call.

    Attributes:
        call: index of the call in the message, from 0.
        name: name of the function.
        id: id that the model wrote, if its format has one.
    """

    call: int
    name: str
    id: str | None = None


class CallArguments(NamedTuple):
    """The next part of a call's arguments; all parts of a call join to one JSON object."""

    call: int
    text: str


class CallEnd(NamedTuple):
    """The end of a call: its arguments are complete."""

    call: int


class CallFailed(NamedTuple):
    """A started call turned out not to be one: it is discarded, and its raw text is content."""

    call: int
    text: str


MessageDelta: TypeAlias = Reasoning | Content | CallStart | CallArguments | CallEnd | CallFailed
