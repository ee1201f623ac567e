"""Tokenizers built from GGUF metadata, and chat templates."""

from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import LaunchError, RequestError
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.tokenizer import load_tokenizer
from tests.support.tiny import BOS, write_checkpoint, write_gguf

MESSAGES = [{"role": "user", "content": "hi"}]


def gpt2(pre: str, **metadata: Any) -> Any:
    """Return a byte-level GGUF tokenizer with some merges and a named pre-tokenizer."""
    alphabet = [chr(c) for c in (*range(0x21, 0x7F), 0x120)]
    merges = ["1 2", "12 3", "Ġ h", "Ġh e"]
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges), "<|end|>"]
    types = [1] * (len(tokens) - 1) + [3]
    meta = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, **metadata}
    return tokenizer_from_gguf(meta, {"tokens": tokens, "merges": merges, "token_type": types})


@pytest.mark.parametrize(
    ("pre", "want"),
    [
        ("gpt-2", ["123", "Ġhe", "Ġ", "12"]),
        ("smollm", ["1", "2", "3", "Ġhe", "Ġ", "Ġ", "1", "2"]),
        ("llama-bpe", ["123", "Ġhe", "Ġ", "Ġ", "12"]),
        ("qwen2", ["1", "2", "3", "Ġhe", "Ġ", "Ġ", "1", "2"]),
        ("tekken", ["1", "2", "3", "Ġhe", "Ġ", "Ġ", "1", "2"]),
        ("gpt-4o", ["123", "Ġhe", "Ġ", "Ġ", "12"]),
        ("deepseek-v3", ["123", "Ġhe", "Ġ", "Ġ", "12"]),
        ("kimi-k2", ["123", "Ġhe", "Ġ", "Ġ", "12"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(pre: str, want: list[str]) -> None:
    text = "123 he  12" if pre != "gpt-2" else "123 he 12"
    assert gpt2(pre).encode(text, add_special_tokens=False).tokens == want


def test_special_tokens_and_bos() -> None:
    tokenizer = gpt2("llama-bpe", **{"tokenizer.ggml.bos_token_id": 5})
    end = tokenizer.get_vocab_size() - 1
    assert tokenizer.encode("he<|end|>").ids[-1] == end
    with_bos = gpt2("gpt-2", **{"tokenizer.ggml.bos_token_id": end, "tokenizer.ggml.add_bos_token": True})
    assert with_bos.encode("he").ids[0] == end


def test_sentencepiece() -> None:
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "h",
        "e",
        "▁h",
        "he",
        "▁he",
        "l",
        "lo",
    ]
    scores = [0.0] * 259 + [-9.0, -8.0, -7.0, -3.0, -2.0, -1.0, -6.0, -5.0]
    types = [2, 3, 3] + [6] * 256 + [1] * 8
    meta = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.unknown_token_id": 0}
    tokenizer = tokenizer_from_gguf(meta, {"tokens": tokens, "scores": scores, "token_type": types})
    encoding = tokenizer.encode("he é")
    assert encoding.tokens == ["<s>", "▁he", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoding.ids) == "he é"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "unheard-of"}, "unheard-of"),
    ],
)
def test_unknown_tokenizers_are_refused_by_name(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        tokenizer_from_gguf(metadata, {"tokens": ["a"], "merges": [], "token_type": [1]})


def test_folder_and_gguf_give_the_same_ids(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write_gguf(tmp_path / "x.gguf")
    folder, file = load_tokenizer(tmp_path), load_tokenizer(tmp_path / "x.gguf")
    for text in ("hello", "héllo 🙂", "<s> and <end>"):
        ids = folder.encode(text, add_special_tokens=True, max_tokens=100)
        assert file.encode(text, add_special_tokens=True, max_tokens=100) == ids
        assert file.decode(ids) == folder.decode(ids) == text
    assert file.eos_token_ids == folder.eos_token_ids == (257,)


def test_a_template_renders_and_continues(tmp_path: Path) -> None:
    template = load_tokenizer(write_checkpoint(tmp_path)).chat_template
    assert template.render(MESSAGES, {}) == "<s><start>user\nhi<end>\n<start>assistant\n"
    turns = [*MESSAGES, {"role": "assistant", "content": "I am"}]
    assert template.render(turns, {}, continue_final_message=True).endswith("<start>assistant\nI am")
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(template.render(MESSAGES, {}), add_special_tokens=False, max_tokens=100)
    assert ids.count(BOS) == 1


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].nothing.more }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{% broken",
    ],
    ids=range(6),
)
def test_templates_that_fail_or_reach_out_are_refused(tmp_path: Path, source: str) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(RequestError, match="chat template"):
        load_tokenizer(tmp_path, source).chat_template.render(MESSAGES, {})


def test_a_prompt_far_too_long_is_not_tokenised(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_checkpoint(tmp_path))
    with pytest.raises(RequestError, match="longer than the model's context length"):
        tokenizer.encode("x" * 1_000_000, add_special_tokens=True, max_tokens=100)
