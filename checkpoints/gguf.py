"""A `.gguf` file under Hugging Face's names: tensors dequantised to f32, metadata as a `config.json`.

Format and quantisations are read by the `gguf` package (llama.cpp's own).
"""

import mmap
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderTensor
from gguf.quants import dequantize

from checkpoints.gguf_architectures import ARCHITECTURES
from checkpoints.source import CheckpointError, Index

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# They are part of what the config says of rotary embeddings.
_IGNORED_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_PERMUTED = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")


class _Reader(GGUFReader):
    """Says where a file ends that is too short; the package's own would make shorter arrays of what is left."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > self.data.size:
            raise ValueError(f"it ends at byte {self.data.size}, within what takes bytes {offset} to {end}")
        return super()._get(offset, dtype, count, override_order)


class GGUFCheckpoint:
    """One open `.gguf` file.

    Raises:
        CheckpointError: not a GGUF file, an unknown architecture, or a tensor without a Hugging Face name.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._reader = _Reader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise CheckpointError(f"{path}: not a readable GGUF file: {error}") from None
        self._path = path
        self._config: dict[str, Any] | None = None
        self._arch = str(self.metadata.get("general.architecture"))
        if self._arch not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: architecture {self._arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        self._architecture = ARCHITECTURES[self._arch]
        self._tensors: dict[str, ReaderTensor] = {}
        for tensor in self._reader.tensors:
            if tensor.name not in _IGNORED_TENSORS:
                self._tensors[self._huggingface_name(tensor.name)] = tensor
        self._shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self._tensors.items()
        }

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """Key-values of the file, without the tokenizer's long lists (see `metadata_list`)."""
        return {
            name: field.contents()
            for name, field in self._reader.fields.items()
            if not (field.types and field.types[0] == GGUFValueType.ARRAY and len(field.data) > 1024)
        }

    def metadata_list(self, name: str) -> list[Any] | None:
        """A list-valued key such as `tokenizer.ggml.tokens`, or None."""
        field = self._reader.get_field(name)
        return None if field is None else list(field.contents())

    @property
    def config(self) -> Mapping[str, Any]:
        """The `config.json` that the metadata amounts to."""
        if self._config is None:
            try:
                self._config = self._read_config()
            except KeyError as error:
                raise CheckpointError(f"{self._path}: metadata {error.args[0]} is missing") from None
            except CheckpointError as error:
                raise CheckpointError(f"{self._path}: {error}") from None
            except (TypeError, ValueError, ArithmeticError) as error:
                raise CheckpointError(f"{self._path}: metadata cannot be read: {error}") from None
        return self._config

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape in Hugging Face's orientation; GGUF lists dimensions innermost first."""
        return self._shapes

    def read(self, name: str, index: Index) -> np.ndarray:
        """Dequantise `tensor[index]`, f32; leading rows outside the index are not touched."""
        tensor = self._tensors[name]
        shape = self.shapes[name]
        num_rows = shape[0]
        start, end, _ = index[0].indices(num_rows)
        # Rotary dimensions are put back in order head by head. A vector's data may be bytes: it is read whole.
        block = self._head_rows(name) if len(shape) > 1 else num_rows
        first, last = start // block * block, -(-end // block) * block
        try:
            values = dequantize(tensor.data[first:last] if len(shape) > 1 else tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise CheckpointError(
                f"{self._path}: tensor {tensor.name} has type {tensor.tensor_type.name}, which is not supported"
            ) from None
        values = values.reshape(last - first, *shape[1:])
        if name.endswith("norm.weight") and self._architecture.norm_shift:
            values = values - np.float32(self._architecture.norm_shift)
        if self._is_permuted(name):
            values = _unpermute(values, (last - first) // self._head_rows(name))
        # The file is mapped; what was read need not stay resident.
        mapping: mmap.mmap = self._reader.data._mmap  # type: ignore[attr-defined]  # noqa: SLF001
        mapping.madvise(mmap.MADV_DONTNEED)
        return values[(slice(start - first, end - first), *index[1:])]

    def close(self) -> None:
        """Let go of the mapping and of the parsed metadata, which for a large vocabulary takes 100 MB."""
        self._tensors.clear()
        vars(self).pop("_reader", None)

    def _is_permuted(self, name: str) -> bool:
        return self._architecture.permuted and name.endswith(_PERMUTED)

    def _huggingface_name(self, name: str) -> str:
        if name in _NAMES:
            return _NAMES[name]
        block, _, rest = name.removeprefix("blk.").partition(".")
        stem, _, kind = rest.rpartition(".")
        own = self._architecture.layer_names.get(stem)
        if not name.startswith("blk.") or own is None or kind not in ("weight", "bias"):
            raise CheckpointError(f"{self._path}: tensor {name!r} has no place in this architecture")
        return f"model.layers.{block}.{own}.{kind}"

    def _head_rows(self, name: str) -> int:
        """Rows that belong together."""
        if not self._is_permuted(name):
            return 1
        key = "attention.head_count" if "q_proj" in name else "attention.head_count_kv"
        return self.shapes[name][0] // self._heads(key)

    def _heads(self, key: str) -> int:
        return int(self.metadata.get(f"{self._arch}.{key}") or self.metadata[f"{self._arch}.attention.head_count"])

    def _read_config(self) -> dict[str, Any]:
        arch, meta = self._arch, self.metadata
        vocab_size, hidden_size = self.shapes["model.embed_tokens.weight"]
        num_heads = self._heads("attention.head_count")
        head_dim = int(meta.get(f"{arch}.attention.key_length") or hidden_size // num_heads)
        ends = {meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
        config: dict[str, Any] = {
            "architectures": [self._architecture.huggingface],
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": int(meta[f"{arch}.feed_forward_length"]),
            "num_hidden_layers": int(meta[f"{arch}.block_count"]),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._heads("attention.head_count_kv"),
            "head_dim": head_dim,
            "max_position_embeddings": int(meta[f"{arch}.context_length"]),
            # Metadata is f32; 1e-05 was meant where 9.99999974e-06 stands.
            "rms_norm_eps": float(f"{meta[f'{arch}.attention.layer_norm_rms_epsilon']:.6g}"),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.shapes,
            "mlp_bias": "model.layers.0.mlp.down_proj.bias" in self.shapes,
            "sliding_window": meta.get(f"{arch}.attention.sliding_window"),
            "rope_parameters": self._rope(),
            "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": sorted(int(end) for end in ends if end is not None),
            "dtype": "bfloat16",
        }
        return config | self._architecture.config(lambda key, default: meta.get(f"{arch}.{key}", default), config)

    def _rope(self) -> dict[str, Any]:
        arch, meta = self._arch, self.metadata
        rope: dict[str, Any] = {
            "rope_theta": float(meta.get(f"{arch}.rope.freq_base", 10_000.0)),
            "rope_type": "default",
        }
        kind = meta.get(f"{arch}.rope.scaling.type", "none")
        if kind != "none":
            rope |= {
                "rope_type": kind,
                "factor": float(meta[f"{arch}.rope.scaling.factor"]),
                "original_max_position_embeddings": meta.get(f"{arch}.rope.scaling.original_context_length"),
            }
        for tensor in self._reader.tensors:
            if tensor.name == "rope_freqs.weight":
                # Llama 3's scaling comes as the finished divisor of each frequency.
                rope["frequency_divisors"] = [float(value) for value in np.asarray(tensor.data).reshape(-1)]
            elif tensor.name.startswith("rope_factors_"):
                rope["rope_type"] = "longrope"
        return rope


def _unpermute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's pairing of rotary dimensions: (i, i + H/2) were stored as neighbours."""
    rows, *rest = values.shape
    paired = values.reshape(num_heads, rows // num_heads // 2, 2, *rest)
    return paired.swapaxes(1, 2).reshape(values.shape)
