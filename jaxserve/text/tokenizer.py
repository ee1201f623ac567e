"""The API's tokenizer: text to token ids, token ids to text incrementally, and the chat template."""

import logging
import re
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from checkpoints.gguf import GGUFCheckpoint
from checkpoints.source import CheckpointError
from jaxserve.errors import LaunchError, RequestError
from jaxserve.request import GrammarTokenizer
from jaxserve.text import tiktoken_tokenizer
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.detokenizer import Detokenizer, TokenBytes
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf

logger = logging.getLogger(__name__)

_CHARACTERS_PER_TOKEN = 64


class TokenText(NamedTuple):
    """The text and the bytes of a single token."""

    text: str
    bytes: bytes


class Tokenizer:
    """A fast (Rust) Hugging Face tokenizer.

    Args:
        tokenizer: the loaded tokenizer.
        chat_template: overrides the tokenizer's chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._rust = tokenizer.backend_tokenizer
        self.special_ids = frozenset(int(token_id) for token_id in tokenizer.all_special_ids) | frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        self._bytes = TokenBytes(self._rust, self.special_ids)
        self._special_of = {self._bytes.of[token_id].decode(): token_id for token_id in self.special_ids}
        longest_first = sorted(self._special_of, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        template = chat_template or tokenizer.chat_template
        self.chat_template = ChatTemplate(tokenizer, template if isinstance(template, str) else None)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`."""
        self._tokenizer.save_pretrained(folder)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's end-of-sequence token, if it has one."""
        token_id: Any = self._tokenizer.eos_token_id
        return () if token_id is None else (int(token_id),)

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the tokenizer."""
        return len(self._tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int, param: str = "prompt") -> list[int]:
        """Encode a text to token ids.

        Args:
            text: text to encode.
            add_special_tokens: add the tokenizer's special tokens, such as beginning of sequence.
            max_tokens: context length.
            param: name of the text in errors.

        Raises:
            RequestError: the text is too long to fit `max_tokens`; this is checked before tokenising.
        """
        if len(text) > max_tokens * _CHARACTERS_PER_TOKEN:
            raise RequestError(
                f"a prompt of {len(text)} characters is longer than the model's context length of {max_tokens} tokens",
                param=param,
                code="context_length_exceeded",
            )
        return self._rust.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Decode a complete text from token ids."""
        detokenizer = Detokenizer(self._bytes, skip_special_tokens=skip_special_tokens, whole_text=True)
        return "".join([detokenizer.push(token_id) for token_id in token_ids]) + detokenizer.flush()

    def detokenizer(self, *, skip_special_tokens: bool, kept_ids: frozenset[int] = frozenset()) -> Detokenizer:
        """Create an incremental decoder; `kept_ids` are special tokens that are not skipped."""
        return Detokenizer(self._bytes, skip_special_tokens=skip_special_tokens, kept_ids=kept_ids)

    def split_special(self, text: str) -> list[str | int]:
        """Split a text at its special tokens into plain text and token ids, in order."""
        parts = self._special_pattern.split(text) if self._special_of else [text]
        return [self._special_of.get(part, part) for part in parts if part]

    def is_token(self, text: str) -> bool:
        """Return whether a text is a single token."""
        return self._rust.token_to_id(text) is not None

    def special_ids_in(self, texts: Iterable[str]) -> frozenset[int]:
        """Return the ids of the special tokens that occur in any of the texts."""
        return frozenset(part for text in texts for part in self.split_special(text) if isinstance(part, int))

    def for_grammars(self, vocab_size: int, eos_token_ids: Iterable[int]) -> GrammarTokenizer:
        """Return the tokenizer as the grammar compiler needs it.

        Args:
            vocab_size: vocabulary size of the model.
            eos_token_ids: tokens that end an output.
        """
        rust = copy(self._rust)
        rust.no_padding()
        rust.no_truncation()
        return GrammarTokenizer(json=rust.to_str(), vocab_size=vocab_size, eos_token_ids=tuple(eos_token_ids))

    def token_text(self, token_id: int) -> TokenText:
        """Return a single token as log-probabilities show it."""
        data = self._bytes.of.get(token_id, b"")
        return TokenText(data.decode(errors="replace"), data)


def load_tokenizer(path: Path, chat_template: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model folder or a `.gguf` file.

    Raises:
        LaunchError: there is no tokenizer, or it is not a fast tokenizer.
    """
    try:
        tokenizer = _load_gguf(path) if path.suffix == ".gguf" else _load_folder(path)
        return Tokenizer(tokenizer, chat_template)
    except (CheckpointError, OSError, ValueError) as error:
        raise LaunchError(f"{path}: no usable tokenizer: {error}") from None


def _load_folder(path: Path) -> PreTrainedTokenizerFast:
    if (path / tiktoken_tokenizer.FILE_NAME).exists() and not (path / "tokenizer.json").exists():
        return tiktoken_tokenizer.load_tiktoken(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise LaunchError(f"{path}: needs a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}")
    return tokenizer


def _load_gguf(path: Path) -> PreTrainedTokenizerFast:
    file = GGUFCheckpoint(path)
    names = ("tokens", "merges", "scores", "token_type")
    lists = {name: file.metadata_list(f"tokenizer.ggml.{name}") for name in names}
    rust = tokenizer_from_gguf(file.metadata, lists)
    tokens = lists["tokens"] or []

    def token(key: str) -> str | None:
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return None if index is None else tokens[int(index)]

    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        chat_template=file.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
