"""Detokenizers and stop strings give the same text for any split of a stream as for the whole."""

import string
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from jaxserve.text.detokenizer import Detokenizer, TokenBytes
from jaxserve.text.stop import StopStrings
from tests.support.tiny import VOCAB_SIZE, byte_tokenizer


def sentencepiece_like() -> Tokenizer:
    """Return a tokenizer with characters, byte tokens for the rest, and a leading space that decoding drops."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *("\u2581" + c for c in "abc"), *"abc\u2581é"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_LEVEL = byte_tokenizer()
SENTENCEPIECE = sentencepiece_like()
BYTES = TokenBytes(BYTE_LEVEL, frozenset({256, 257, 258, 259}))
PIECES = TokenBytes(SENTENCEPIECE, frozenset())


def detokenize(token_bytes: TokenBytes, ids: list[int], *, skip: bool) -> list[str]:
    detokenizer = Detokenizer(token_bytes, skip_special_tokens=skip, whole_text=True)
    return [detokenizer.push(token_id) for token_id in ids] + [detokenizer.flush()]


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=60), st.booleans())
def test_byte_level_pieces_join_to_the_whole(ids: list[int], skip: bool) -> None:
    assert "".join(detokenize(BYTES, ids, skip=skip)) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.integers(257, SENTENCEPIECE.get_vocab_size() - 1) | st.sampled_from([0xC3, 0xA9]), max_size=40))
def test_sentencepiece_pieces_join_to_the_whole(ids: list[int]) -> None:
    """Only valid UTF-8 is compared: for invalid bytes, the Rust decoder gives up on the valid ones around them, too."""
    try:
        b"".join(PIECES.of[token_id] for token_id in ids).decode()
    except UnicodeDecodeError:
        return
    assert "".join(detokenize(PIECES, ids, skip=True)) == SENTENCEPIECE.decode(ids)


@given(st.text(max_size=40), st.sampled_from(["byte level", "sentencepiece"]))
def test_detokenizer_never_emits_replacement_for_split_character(text: str, kind: str) -> None:
    data = text.encode(errors="replace")
    ids = [byte if kind == "byte level" else byte + 1 for byte in data]
    pieces = detokenize(BYTES if kind == "byte level" else PIECES, ids, skip=True)
    whole = data.decode()
    assert "".join(pieces) == (whole if kind == "byte level" else whole.removeprefix(" "))
    assert pieces[-1] == ""


ALPHABET = "ab🙂"


@given(
    text=st.text(ALPHABET, max_size=30),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    keep=st.booleans(),
)
def test_stop_strings_cut_alike_for_any_cutting(text: str, stops: list[str], cuts: list[int], keep: bool) -> None:
    def run(pieces: list[str]) -> tuple[str, str | None]:
        checker = StopStrings(tuple(stops), keep=keep)
        out = ""
        for piece in pieces:
            shown, matched = checker.push(piece)
            out += shown
            if matched is not None:
                return out, matched
        return out + checker.flush(), None

    edges = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    pieces = [text[start:end] for start, end in pairwise(edges)]
    by_character = run(list(text))
    assert run(pieces) == by_character
    # One character at a time, the first stop string to be complete ends the text.
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert by_character == (text, None)
    else:
        end, start, stop = min(ends)
        assert by_character == (text[:end] if keep else text[:start], stop)


@given(st.text(string.ascii_lowercase, max_size=20), st.text(string.ascii_lowercase, min_size=1, max_size=5))
def test_only_a_possible_prefix_is_held_back(text: str, stop: str) -> None:
    checker = StopStrings((stop,))
    shown, matched = checker.push(text)
    if matched is None:
        held = text[len(shown) :]
        assert held == "" or stop.startswith(held)
