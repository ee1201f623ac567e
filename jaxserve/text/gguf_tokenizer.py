"""A tokenizer rebuilt from a GGUF file's metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

GGUF contains only the name of the pre-tokenizer, so this module defines the patterns by name.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.errors import LaunchError
from jaxserve.text.tiktoken_tokenizer import KIMI_K2_WORDS

_CONTROL, _USER_DEFINED, _NORMAL = 3, 4, 1

_DIGIT_GROUPS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SINGLE_DIGITS = _DIGIT_GROUPS.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# OpenAI's o200k.
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_ENDINGS}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# DeepSeek V3's patterns, applied one after the other.
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


_PRE_TOKENIZERS: Mapping[str, Any] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "phi-2": _gpt2,
    "smollm": _digits_then_gpt2,
    "starcoder": _digits_then_gpt2,
    "refact": _digits_then_gpt2,
    "codeshell": _digits_then_gpt2,
    "llama3": lambda: _split(_DIGIT_GROUPS),
    "llama-v3": lambda: _split(_DIGIT_GROUPS),
    "llama-bpe": lambda: _split(_DIGIT_GROUPS),
    "smaug-bpe": lambda: _split(_DIGIT_GROUPS),
    "dbrx": lambda: _split(_DIGIT_GROUPS),
    "qwen2": lambda: _split(_SINGLE_DIGITS),
    "deepseek-r1-qwen": lambda: _split(_SINGLE_DIGITS),
    "stablelm2": lambda: _split(_SINGLE_DIGITS),
    "tekken": lambda: _split(_TEKKEN),
    "gpt-4o": lambda: _split(_O200K),
    "deepseek-v3": lambda: _split(*_DEEPSEEK_V3),
    "kimi-k2": lambda: _split(KIMI_K2_WORDS),
}
# For these, llama.cpp uses a word that is in the vocabulary as one token, without trying merges.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "tekken")
_ADDS_BOS = ("llama3", "llama-v3", "llama-bpe", "tekken")


def tokenizer_from_gguf(metadata: Mapping[str, Any], lists: Mapping[str, list[Any] | None]) -> Tokenizer:
    """Build the tokenizer.

    Args:
        metadata: scalar key-values of the file.
        lists: `tokens`, `merges`, `scores` and `token_type` of `tokenizer.ggml`.

    Raises:
        LaunchError: the kind or pre-tokenizer is not supported, or lists are missing.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens, types = lists.get("tokens"), lists.get("token_type")
    if not tokens:
        raise LaunchError("the GGUF file carries no tokenizer; give --tokenizer-path")
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    match kind:
        case "gpt2":
            tokenizer = _byte_level_bpe(tokens, lists.get("merges") or [], pre)
            adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", pre in _ADDS_BOS))
        case "llama":
            tokenizer = _sentencepiece_bpe(tokens, lists.get("scores") or [], metadata)
            adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", True))
        case _:
            raise LaunchError(f"GGUF tokenizer {kind!r} is not supported; supported: gpt2, llama")
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types or [], strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if adds_bos and bos is not None:
        token = tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token}:0 $A:0" if ":" not in token else [token, "$A"],
            pair=[token, "$A", token, "$B"],
            special_tokens=[(token, bos)],
        )
    return tokenizer


def _byte_level_bpe(tokens: list[str], merges: list[str], pre: str) -> Tokenizer:
    if pre not in _PRE_TOKENIZERS:
        raise LaunchError(
            f"GGUF pre-tokenizer {pre!r} is not supported; supported: {', '.join(_PRE_TOKENIZERS)}. "
            "Give --tokenizer-path with the original tokenizer"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in _WHOLE_WORDS))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(tokens: list[str], scores: list[float], metadata: Mapping[str, Any]) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[int(metadata.get("tokenizer.ggml.unknown_token_id", 0))]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, _merges_from_scores(vocabulary, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "\u2581")]
    strip: list[decoders.Decoder] = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("\u2581"))
        strip = [decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_from_scores(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return all merges, ranked as in SentencePiece by the score of the merged token; its splits share the rank."""
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[index], vocabulary[left], vocabulary[right], (left, right)))
    return [pair for *_, pair in sorted(merges)]
