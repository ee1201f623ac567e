"""The deltas of an assistant's message, in the order in which its text arrives."""

from typing import NamedTuple, TypeAlias


class Reasoning(NamedTuple):
    """Text of the model's thinking."""

    text: str


class Content(NamedTuple):
    """Text for the user."""

    text: str


class CallStart(NamedTuple):
    """A tool call begins.

    Attributes:
        call: counts the message's calls from 0.
        name: name of the function.
        id: the model's own, where its format has one.
    """

    call: int
    name: str
    id: str | None = None


class CallArguments(NamedTuple):
    """More of a call's arguments; all of a call's join to one JSON object."""

    call: int
    text: str


class CallEnd(NamedTuple):
    """A call's arguments are complete."""

    call: int


class CallFailed(NamedTuple):
    """A call that began turns out not to be one: it does not count, and its raw text is content."""

    call: int
    text: str


MessageDelta: TypeAlias = Reasoning | Content | CallStart | CallArguments | CallEnd | CallFailed
