"""Presents a `.gguf` file under Hugging Face's names: tensors dequantised to f32, metadata as a `config.json`.

llama.cpp's `gguf` package reads the file format and the quantisations.
"""

import mmap
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderTensor

from checkpoints.gguf_architectures import ARCHITECTURES
from checkpoints.gguf_views import OfExpert, View, Whole, shape_of
from checkpoints.source import CheckpointError, Index

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# The config's rotary embedding parameters account for these.
_IGNORED_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_PERMUTED = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")


class _Reader(GGUFReader):
    """Raises an error for a truncated file, of which `GGUFReader` would return shortened arrays."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > self.data.size:
            raise ValueError(
                f"the file is truncated at byte {self.data.size}, inside the data at bytes {offset} to {end}"
            )
        return super()._get(offset, dtype, count, override_order)


def read_values(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """Read some key-values of a file, without its tensors; keys that the file does not contain are left out.

    Raises:
        CheckpointError: the file is not a readable GGUF file.
    """
    try:
        fields = _Reader(path).fields
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable GGUF file: {error}") from None
    return {key: fields[key].contents() for key in keys if key in fields}


class GGUFCheckpoint:
    """One open `.gguf` file.

    Raises:
        CheckpointError: it is not a GGUF file, its architecture is unknown, or a tensor has no Hugging Face name.
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
        self._views = self._make_views()
        self._shapes = {name: view.shape for name, view in self._views.items()}

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """Key-values of the file, without the tokenizer's long lists (see `metadata_list`)."""
        return {
            name: field.contents()
            for name, field in self._reader.fields.items()
            if not (field.types and field.types[0] == GGUFValueType.ARRAY and len(field.data) > 1024)
        }

    def metadata_list(self, name: str) -> list[Any] | None:
        """Return the list under a key such as `tokenizer.ggml.tokens`, or None if the key is absent."""
        field = self._reader.get_field(name)
        return None if field is None else list(field.contents())

    @property
    def config(self) -> Mapping[str, Any]:
        """The metadata, converted to a `config.json`."""
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
        """Dequantise `tensor[index]` to f32; leading rows outside the index are not touched."""
        try:
            values = self._views[name].read(index)
        except CheckpointError as error:
            raise CheckpointError(f"{self._path}: {error}") from None
        # The file is memory-mapped; the pages that were read need not stay resident.
        mapping: mmap.mmap = self._reader.data._mmap  # type: ignore[attr-defined]  # noqa: SLF001
        mapping.madvise(mmap.MADV_DONTNEED)
        return values

    def close(self) -> None:
        """Release the mapping and the parsed metadata, which takes 100 MB for a large vocabulary."""
        self._views.clear()
        vars(self).pop("_reader", None)

    def _make_views(self) -> dict[str, View]:
        """Return a view of every tensor, by Hugging Face name."""
        views: dict[str, View] = {}
        parts: dict[tuple[str, str], ReaderTensor] = {}
        for tensor in self._reader.tensors:
            if tensor.name in _IGNORED_TENSORS:
                continue
            block, _, rest = tensor.name.removeprefix("blk.").partition(".")
            if tensor.name in _NAMES:
                name = _NAMES[tensor.name]
                views[name] = self._whole(name, tensor)
            elif not tensor.name.startswith("blk."):
                raise self._no_place(tensor)
            elif any(rest in merged.parts for merged in self._architecture.merged.values()):
                parts[block, rest] = tensor
            else:
                views |= self._of_layer(tensor, block, rest)
        for block, rest in list(parts):
            for name, merged in self._architecture.merged.items():
                if rest == merged.parts[0]:
                    found = [parts.pop((block, part), None) for part in merged.parts]
                    if None in found:
                        raise CheckpointError(
                            f"{self._path}: blk.{block} must contain all of {', '.join(merged.parts)}"
                        )
                    views[f"model.layers.{block}.{name}"] = merged.view(*found)
        if parts:
            raise self._no_place(next(iter(parts.values())))
        return views

    def _of_layer(self, tensor: ReaderTensor, block: str, rest: str) -> dict[str, View]:
        """Return the view of a layer's tensor, or the views of its experts' matrices."""
        stem, _, kind = rest.rpartition(".")
        names = self._architecture.layer_names
        own = names.get(rest) or (f"{names[stem]}.{kind}" if stem in names and kind in ("weight", "bias") else None)
        if own is None:
            raise self._no_place(tensor)
        name = f"model.layers.{block}.{own}"
        if "{expert}" not in name:
            return {name: self._whole(name, tensor)}
        return {name.format(expert=expert): OfExpert(tensor, expert) for expert in range(shape_of(tensor)[0])}

    def _whole(self, name: str, tensor: ReaderTensor) -> Whole:
        permuted = self._architecture.permuted and name.endswith(_PERMUTED)
        key = "attention.head_count" if "q_proj" in name else "attention.head_count_kv"
        shift = self._architecture.norm_shift if name.endswith("norm.weight") else 0.0
        return Whole(tensor, self._heads(key) if permuted else 0, shift)

    def _no_place(self, tensor: ReaderTensor) -> CheckpointError:
        return CheckpointError(f"{self._path}: tensor {tensor.name!r} is unknown in this architecture")

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
            # Metadata is f32: 9.99999974e-06 stands for 1e-05.
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
                # Llama 3's scaling is stored as a precomputed divisor of each frequency.
                rope["frequency_divisors"] = [float(value) for value in np.asarray(tensor.data).reshape(-1)]
            elif tensor.name.startswith("rope_factors_"):
                rope["rope_type"] = "longrope"
        return rope
