"""Stop strings in a stream of text."""

from typing import NamedTuple


class StopResult(NamedTuple):
    """The text that can be emitted, and the stop string that ended the stream, if any."""

    text: str
    matched: str | None


class StopStrings:
    """Truncates a text stream before the first stop string.

    Holds back only the longest suffix that could still become a stop string. The result does not depend on how the
    stream is chunked.

    Args:
        stops: stop strings, none of them empty.
        keep: include the stop string in the text (`no_stop_trim`).
    """

    def __init__(self, stops: tuple[str, ...], *, keep: bool = False) -> None:
        self._stops = stops
        self._keep = keep
        self._held = ""

    def push(self, text: str) -> StopResult:
        """Add text and return the result so far; must not be called after a match."""
        if not self._stops:
            return StopResult(text, None)
        self._held += text
        found = [(position, -len(stop), stop) for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            # The match that ends first wins, as if the text had arrived one character at a time.
            position, _, stop = min(found, key=lambda item: (item[0] - item[1], item[0]))
            return StopResult(self._held[: position + len(stop) * self._keep], stop)
        keep = self._longest_open_suffix()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return StopResult(shown, None)

    def flush(self) -> str:
        """Return the text that is still held back at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _longest_open_suffix(self) -> int:
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
