"""Kimi's tokenizer file, read without the code that comes with it, gives the ids of tiktoken."""

import base64
import json
import random
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Tokenizer as Rust
from tokenizers import models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jaxserve.errors import LaunchError
from jaxserve.text.tiktoken_tokenizer import KIMI_K2_WORDS
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

TEXT = (
    """The quick brown fox doesn't jump; it's 12345 o'clock, I'LL wait.\r\n\r\n  Indented   text\twith tabs
你好,世界!汉字abc混排 中文 English 한국어 ひらがな カタカナ Ünïcödé naïve café — “quotes” 🙂🙃
def f(x):\n    return x ** 2  # 3.14159\n\n\n"""
    * 3
)
SPECIAL = {"[BOS]": 0, "[EOS]": 1, "<|im_end|>": 2, "<think>": 6}


def ranks_of(text: str) -> dict[bytes, int]:
    """Return the ranks of a BPE vocabulary learned from the text, single bytes first."""
    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = list(bytes_to_unicode().values())
    rust.train_from_iterator([text], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    back = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokens = sorted(rust.get_vocab().items(), key=lambda item: item[1])
    return {bytes(back[letter] for letter in token): rank for rank, (token, _) in enumerate(tokens)}


RANKS = ranks_of(TEXT)


def write(folder: Path, lines: list[str] | None = None, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    written = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in RANKS.items()]
    (folder / "tiktoken.model").write_text("\n".join(written if lines is None else lines) + "\n")
    added = {
        str(len(RANKS) + place): {"content": token, "special": token != "<think>"} for token, place in SPECIAL.items()
    }
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": {"content": "[EOS]"},
        "chat_template": "{{ messages[0].content }}<|im_end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_k2"}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write(tmp_path_factory.mktemp("kimi")))


def test_ids_are_those_of_tiktoken(tokenizer: Tokenizer) -> None:
    theirs = tiktoken.Encoding("test", pat_str=KIMI_K2_WORDS, mergeable_ranks=RANKS, special_tokens={})
    draw = random.Random(0)
    texts = [TEXT, "", " ", "a\n \n b", "don'T", "ABCdef汉abc", "  \r\n x"]
    texts += ["".join(draw.choices(TEXT, k=draw.randrange(1, 60))) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=True, max_tokens=10_000)
        assert ids == theirs.encode(text), text
        assert tokenizer.decode(ids) == text


def test_special_tokens_have_their_places(tokenizer: Tokenizer) -> None:
    first = len(RANKS)
    ids = tokenizer.encode("[BOS]<think>hi<|im_end|>", add_special_tokens=False, max_tokens=100)
    assert (ids[0], ids[1], ids[-1]) == (first, first + 6, first + 2)
    assert tokenizer.eos_token_ids == (first + 1,)
    assert tokenizer.vocab_size == first + 256
    assert tokenizer.is_token(f"<|reserved_token_{first + 255}|>")
    # A special token is left out of the text, a token that is only added is not.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>hi"


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        (["IQ== 0", "Ig== 0"], {}, "line 2: rank 0"),
        (["IQ== 0 1"], {}, "line 1: too many values"),
        (["%% 0"], {}, "line 1: "),
        (["IQ== 0"], {}, "255 single bytes"),
        (None, {"tokenizer_class": "OtherTokenizer"}, "tokenizer class OtherTokenizer is not supported"),
        (None, {"bos_token": {"content": 3}}, "is not a valid token"),
    ],
)
def test_files_that_cannot_be_used(
    lines: list[str] | None, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LaunchError, match=message):
        load_tokenizer(write(tmp_path / "model", lines, **changes))
