"""Incremental detokenizer. A character that is split between tokens never appears as a replacement character.

Every supported tokenizer maps each token to bytes, and text is their concatenation decoded as UTF-8: byte-level BPE
(GPT-2's printable alphabet) and SentencePiece-like BPE with byte fallback. Detokenizing is therefore a table lookup and
an incremental UTF-8 decoder, exact for any chunking of the stream.
"""

import codecs
import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

_SPACE = "\u2581"


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable alphabet of bytes, as character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(b for b in range(256) if b not in printable)})
    return table


class TokenBytes:
    """The bytes of every token of a tokenizer, shared by all its detokenizers.

    Attributes:
        special_ids: control tokens, which a detokenizer may skip.
        of: token id -> bytes.
        strips_space: whether one leading space of a text is an artefact of the tokenizer.

    Raises:
        ValueError: the tokenizer's decoder cannot be written as a table of bytes.
    """

    def __init__(self, tokenizer: RustTokenizer, special_ids: frozenset[int]) -> None:
        self.special_ids = special_ids
        decoder: dict[str, Any] = json.loads(tokenizer.to_str())["decoder"] or {}
        kinds = {step["type"]: step for step in _steps(decoder)}
        self.of: dict[int, bytes] = {}
        added = tokenizer.get_added_tokens_decoder()
        if "ByteLevel" in kinds:
            self.strips_space = False
            alphabet = byte_alphabet()
            for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
                plain = token_id not in added and all(character in alphabet for character in token)
                self.of[token_id] = bytes(alphabet[character] for character in token) if plain else token.encode()
        elif "Metaspace" in kinds or "ByteFallback" in kinds:
            self.strips_space = "Strip" in kinds or kinds.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
            for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
                self.of[token_id] = token.encode() if token_id in added else _piece_bytes(token)
        else:
            raise ValueError(f"the tokenizer's decoder ({', '.join(kinds) or 'none'}) is not supported")


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder:
        yield decoder


def _piece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode()


class Detokenizer:
    """Incremental decoder of one output.

    Args:
        token_bytes: bytes of every token of the tokenizer.
        skip_special_tokens: leave control tokens out of the text, except for `kept_ids`.
        kept_ids: control tokens that are never skipped.
        whole_text: whether the output is the start of a text instead of the continuation of one.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        *,
        skip_special_tokens: bool,
        kept_ids: frozenset[int] = frozenset(),
        whole_text: bool = False,
    ) -> None:
        self._bytes_of = token_bytes.of
        self._skipped = token_bytes.special_ids - kept_ids if skip_special_tokens else frozenset[int]()
        # Only a whole text starts with the artefact; an output that continues a prompt keeps its space.
        self._strip = whole_text and token_bytes.strips_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is now certain, which may be empty; unknown ids are ignored."""
        if token_id in self._skipped:
            return ""
        text = self._decoder.decode(self._bytes_of.get(token_id, b""))
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """Return the remaining text: U+FFFD for bytes that never became a character."""
        return self._decoder.decode(b"", final=True)
