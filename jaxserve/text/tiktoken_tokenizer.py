"""A tokenizer built from a `tiktoken.model` file: one token per line, its bytes in base64 and its rank.

Kimi's models come with this file and with Python code that reads it; that code is not run. The file contains neither
the pattern that splits text into words, which is defined here, nor the special tokens, which are in
`tokenizer_config.json`.
"""

import base64
import binascii
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from checkpoints.huggingface import read_json
from checkpoints.source import CheckpointError

FILE_NAME = "tiktoken.model"
_MAX_FILE_BYTES = 64 << 20
# Number of ids after the ranks that Kimi reserves for special tokens.
_NUM_SPECIAL = 256
_CLASS = "TikTokenTokenizer"
# Kimi K2's pattern: Chinese characters form separate words, whatever letters are next to them.
KIMI_K2_WORDS = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def load_tiktoken(folder: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a model folder.

    Raises:
        CheckpointError: the files are invalid, or from another model family than Kimi.
    """
    config = read_json(folder / "tokenizer_config.json")
    if (found := config.get("tokenizer_class")) != _CLASS:
        raise CheckpointError(
            f"{folder / FILE_NAME}: tokenizer class {found} is not supported; add a tokenizer.json to the folder"
        )
    ranks = _read_ranks(folder / FILE_NAME)
    special = _special_tokens(config, len(ranks))
    rust = _byte_level_bpe(ranks, [token.content for token in special])
    rust.add_special_tokens([token for token in special if token.special])
    rust.add_tokens([token for token in special if not token.special])
    names = {
        name: _content(config[name])
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if config.get(name)
    }
    template = folder / "chat_template.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        chat_template=template.read_text() if template.exists() else config.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **names,
    )


def _read_ranks(path: Path) -> list[bytes]:
    """Return the tokens in the order of their ranks."""
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise CheckpointError(f"{path}: larger than {_MAX_FILE_BYTES >> 20} MiB")
    tokens: list[bytes] = []
    for number, line in enumerate(filter(None, path.read_bytes().splitlines())):
        try:
            data, rank = line.split()
            tokens.append(base64.b64decode(data, validate=True))
            if int(rank) != number:
                raise ValueError(f"rank {int(rank)}")
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(f"{path}: line {number + 1}: {error}") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in set(tokens)]
    if missing or len(set(tokens)) != len(tokens):
        raise CheckpointError(
            f"{path}: tokens are missing ({len(missing)} single bytes), or the file has duplicate tokens"
        )
    return tokens


def _special_tokens(config: Mapping[str, Any], first_id: int) -> list[AddedToken]:
    """Return the named special tokens, and reserved tokens for the ids between them."""
    named: Mapping[str, Any] = config.get("added_tokens_decoder") or {}
    tokens: list[AddedToken] = []
    for token_id in range(first_id, first_id + _NUM_SPECIAL):
        entry = named.get(str(token_id))
        content = f"<|reserved_token_{token_id}|>" if entry is None else _content(entry)
        special = entry is None or bool(entry.get("special", True))
        tokens.append(AddedToken(content, special=special, normalized=False))
    return tokens


def _content(token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise CheckpointError(f"tokenizer_config.json: {token!r} is not a valid token")
    return content


def _byte_level_bpe(ranks: list[bytes], special: list[str]) -> Tokenizer:
    """Build a BPE that uses a word in the vocabulary as one token, or else merges the lowest-ranked pair first.

    The rank of a pair is that of the merged token.
    """
    letters = bytes_to_unicode()
    words = ["".join(letters[byte] for byte in token) for token in ranks]
    vocabulary = {word: rank for rank, word in enumerate(itertools.chain(words, special))}
    merges: list[tuple[str, str]] = []
    for word in words:
        cuts = [(word[:cut], word[cut:]) for cut in range(1, len(word))]
        pairs = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(KIMI_K2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
