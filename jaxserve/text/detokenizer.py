"""Token ids to text, as they come. No replacement character ever leaves because a character was cut in two.

For any cutting of the ids, the pieces joined equal the decoding of the whole.
"""

import codecs
from typing import Protocol

from tokenizers import Tokenizer as RustTokenizer


class Detokenizer(Protocol):
    """Incremental decoder of one output."""

    def push(self, token_id: int) -> str:
        """Text that is certain once this token is there; may be empty."""
        ...

    def flush(self) -> str:
        """The rest, with U+FFFD for bytes that never became a character."""
        ...


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, as character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(b for b in range(256) if b not in printable)})
    return table


class ByteLevelVocabulary:
    """Bytes of every token of a byte-level tokenizer; shared by all its detokenizers."""

    def __init__(self, tokenizer: RustTokenizer, special_ids: frozenset[int]) -> None:
        alphabet = byte_alphabet()
        self.special_ids = special_ids
        self.bytes_of: dict[int, bytes] = {}
        added = tokenizer.get_added_tokens_decoder()
        for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
            if token_id in added or any(character not in alphabet for character in token):
                self.bytes_of[token_id] = token.encode()
            else:
                self.bytes_of[token_id] = bytes(alphabet[character] for character in token)


class ByteLevelDetokenizer:
    """For byte-level BPE: tokens are byte strings, and text is their concatenation read as UTF-8."""

    def __init__(self, vocabulary: ByteLevelVocabulary, *, skip_special_tokens: bool) -> None:
        self._bytes_of = vocabulary.bytes_of
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._bytes_of.get(token_id, b""))

    def flush(self) -> str:
        """See `Detokenizer`."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any other tokenizer: decodes a short window before and after the new token and shows the difference.

    The window starts at a place where text was complete, because decoders treat the first token of a text
    differently (SentencePiece drops its leading space).
    """

    def __init__(self, tokenizer: RustTokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._window = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        self._ids.append(token_id)
        before, after = self._decode(self._ids[self._window : self._shown]), self._decode(self._ids[self._window :])
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """See `Detokenizer`."""
        before, after = self._decode(self._ids[self._window : self._shown]), self._decode(self._ids[self._window :])
        self._window = self._shown = len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
