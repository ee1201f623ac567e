"""OpenAI's harmony format, which gpt-oss writes: messages in channels.

`<|start|>assistant<|channel|>NAME to=RECIPIENT <|constrain|>json<|message|>TEXT<|end|>`; a call ends with `<|call|>`
and an answer with `<|return|>`, which are stop tokens and therefore never in the text.
"""

import re
from typing import NamedTuple

from jaxserve.parsing.stream_reader import Parse, StreamReader

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
ENDS = (END, CALL, RETURN)

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


class Header(NamedTuple):
    """The header of a message: everything before its text.

    Attributes:
        raw: the header as written.
        channel: `analysis`, `commentary`, `final` or another; empty if there is none.
        recipient: recipient of a tool call, such as `functions.NAME`; empty if there is none.
        complete: whether the header ends with `<|message|>`, after which the text follows.
    """

    raw: str
    channel: str
    recipient: str
    complete: bool


def read_header(reader: StreamReader, first: str) -> Parse[Header]:
    """Read the rest of a header whose first marker has been read."""
    parts = [first]
    marker: str | None = first
    while marker is not None and marker != MESSAGE:
        marker = yield from reader.until((START, CHANNEL, CONSTRAIN, MESSAGE, END), parts.append)
        parts.append(marker or "")
        if marker == END:
            break
    raw = "".join(parts)
    channel, recipient = _CHANNEL.search(raw), _RECIPIENT.search(raw)
    return Header(
        raw, channel.group(1) if channel else "", recipient.group(1) if recipient else "", complete=marker == MESSAGE
    )
