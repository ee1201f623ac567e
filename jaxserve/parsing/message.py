"""A message assembled from its deltas."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxserve.parsing.deltas import CallArguments, CallEnd, CallFailed, CallStart, Content, MessageDelta, Reasoning


@dataclass
class Call:
    """One tool call.

    Attributes:
        name: name of the function.
        id: id that the model wrote, if its format has one.
        arguments: arguments as JSON text.
        complete: whether the arguments have ended.
    """

    name: str
    id: str | None
    arguments: str = ""
    complete: bool = False


@dataclass
class Message:
    """An assistant message.

    Attributes:
        calls: tool calls by index, without those that failed.
    """

    content: str = ""
    reasoning: str = ""
    calls: dict[int, Call] = field(default_factory=dict[int, Call])

    def add(self, deltas: Iterable[MessageDelta]) -> "Message":
        """Append deltas in order and return the message."""
        for delta in deltas:
            match delta:
                case Content(text=text):
                    self.content += text
                case Reasoning(text=text):
                    self.reasoning += text
                case CallStart(call=index, name=name, id=call_id):
                    self.calls[index] = Call(name, call_id)
                case CallArguments(call=index, text=text):
                    self.calls[index].arguments += text
                case CallEnd(call=index):
                    self.calls[index].complete = True
                case CallFailed(call=index, text=text):
                    del self.calls[index]
                    self.content += text
        return self
