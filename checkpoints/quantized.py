"""Quantised tensors under one set of names and in one layout, whatever tool wrote them.

`NAME` holds a matrix's numbers [O, I], or bytes of two 4-bit ones [O, I / 2], the first in the lower half; `NAME_scale`
the factors of its blocks [O / rows, I / columns], and `NAME_zero` u8 zero points where blocks have their own.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from checkpoints.source import CheckpointError, Index, TensorSource

_PER_WORD = 8  # 4-bit numbers in 32 bits
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output columns of a word's numbers, lowest first


class _View(Protocol):
    """A tensor made of one that the file has."""

    shape: tuple[int, ...]

    def read(self, index: Index) -> np.ndarray:
        """Part of it."""
        ...


_Views: TypeAlias = dict[str, _View]


class QuantizedCheckpoint:
    """Tensors of another checkpoint, as described above."""

    def __init__(self, source: TensorSource, views: Callable[[TensorSource], Iterator[tuple[str, _View]]]) -> None:
        self._source = source
        self._views: _Views = dict(views(source))

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed `config.json`."""
        return self._source.config

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: view.shape for name, view in self._views.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """Read part of a tensor."""
        return self._views[name].read(index)

    def close(self) -> None:
        """Release the files."""
        self._source.close()


def with_quantized_names(source: TensorSource) -> TensorSource:
    """The checkpoint with its quantised tensors as described above; itself if it has none, or of an unknown kind."""
    quantization = source.config.get("quantization_config") or source.config.get("compression_config") or {}
    views = _METHODS.get(str(quantization.get("quant_method")))
    return source if views is None else QuantizedCheckpoint(source, views)


class Quantizer(NamedTuple):
    """Rounds matrices to small numbers, to the nearest.

    Attributes:
        dtype: int8, float8_e4m3fn, or uint8 for two signed 4-bit integers in a byte, 8 above what they are.
        columns: that share a factor; 0 for whole rows.
        scale_dtype: dtype of the factors.
    """

    dtype: np.dtype
    columns: int
    scale_dtype: np.dtype

    def scales(self, w: np.ndarray) -> np.ndarray:
        """The scales of a weight [..., O, I]: [..., O, I / columns]."""
        return self._scales(self._blocks(w))

    def elements(self, w: np.ndarray) -> np.ndarray:
        """The stored values of a weight [..., O, I]; 4-bit values come as bytes of two."""
        blocks = self._blocks(w)
        # What a factor is rounded to is what numbers are divided by.
        scale = self._scales(blocks).astype(np.float32)
        elements = blocks / np.where(scale == 0, 1, scale)[..., None]
        elements = elements.reshape(*w.shape[:-1], -1)[..., : w.shape[-1]]
        if self.dtype != np.uint8:
            return (np.rint(elements) if self.dtype == np.int8 else elements).astype(self.dtype)
        code = (np.rint(elements) + 8).astype(np.uint8)
        return code[..., ::2] | code[..., 1::2] << 4

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return (np.abs(blocks).max(-1) / self._largest).astype(self.scale_dtype)

    def _blocks(self, w: np.ndarray) -> np.ndarray:
        """f32[..., O, I / columns, columns]; the last one is filled up with zeros."""
        size = w.shape[-1]
        columns = self.columns or size
        if rest := -size % columns:
            w = np.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, rest)])
        return w.astype(np.float32).reshape(*w.shape[:-1], -1, columns)

    @property
    def _largest(self) -> float:
        return {np.dtype(np.int8): 127.0, np.dtype(np.uint8): 7.0}.get(self.dtype, 448.0)

    @property
    def per_byte(self) -> int:
        """Numbers in a byte."""
        return 2 if self.dtype == np.uint8 else 1


def quantizing(source: TensorSource, names: Set[str], quantizer: Quantizer) -> TensorSource:
    """A checkpoint whose tensors of these names are quantised while they are read."""

    def views(source: TensorSource) -> Iterator[tuple[str, _View]]:
        for name in source.shapes:
            if name in names:
                yield name, _Quantized(source, name, quantizer, scale=False)
                yield f"{name}_scale", _Quantized(source, name, quantizer, scale=True)
            else:
                yield name, _Plain(source, name)

    return QuantizedCheckpoint(source, views)


class _Quantized:
    """A tensor's numbers, or its factors."""

    def __init__(self, source: TensorSource, tensor: str, quantizer: Quantizer, *, scale: bool) -> None:
        *lead, size = source.shapes[tensor]
        num_scales = -(-size // (quantizer.columns or size))
        self.shape = (*lead, num_scales if scale else size // quantizer.per_byte)
        self._source, self._tensor, self._quantizer, self._scale = source, tensor, quantizer, scale

    def read(self, index: Index) -> np.ndarray:
        """Part of it; rows are read whole."""
        index = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        whole = self._source.read(self._tensor, (*index[:-1], slice(None)))
        made = self._quantizer.scales(whole) if self._scale else self._quantizer.elements(whole)
        return made[..., index[-1]]


class _Plain:
    """A tensor as it is."""

    def __init__(self, source: TensorSource, tensor: str) -> None:
        self.shape = tuple(source.shapes[tensor])
        self._source, self._tensor = source, tensor

    def read(self, index: Index) -> np.ndarray:
        """Part of it."""
        return self._source.read(self._tensor, index)


class _Bytes:
    """A tensor whose last axes are read as one of bytes.

    Args:
        source: has it.
        tensor: its name.
        num_axes: how many the result has.
        itemsize: bytes of an entry.
    """

    def __init__(self, source: TensorSource, tensor: str, num_axes: int, itemsize: int) -> None:
        shape = source.shapes[tensor]
        if len(shape) < num_axes:
            raise CheckpointError(f"tensor {tensor}: shape {tuple(shape)} has fewer than {num_axes} axes")
        self.shape = (*shape[: num_axes - 1], int(np.prod(shape[num_axes - 1 :])) * itemsize)
        self._source, self._tensor, self._itemsize = source, tensor, itemsize

    def read(self, index: Index) -> np.ndarray:
        """Part of it."""
        index = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        values = np.ascontiguousarray(self._source.read(self._tensor, index[:-1]))
        if values.dtype.itemsize != self._itemsize:
            raise CheckpointError(f"tensor {self._tensor} is {values.dtype}, not of {8 * self._itemsize} bits")
        return values.view(np.uint8).reshape(*values.shape[: len(self.shape) - 1], -1)[..., index[-1]]


class _Repacked:
    """A tensor that has to be read whole and turned; it is kept until another one is read.

    Args:
        read_whole: reads it.
        shape: shape of the result.
    """

    def __init__(self, read_whole: Callable[[], np.ndarray], shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._read_whole = read_whole

    def read(self, index: Index) -> np.ndarray:
        """Part of it."""
        return self._read_whole()[index]


def _fp8(source: TensorSource) -> Iterator[tuple[str, _View]]:
    """DeepSeek's, whose factors are called inverse."""
    for name in source.shapes:
        yield name.removesuffix("_inv") if name.endswith(".weight_scale_inv") else name, _Plain(source, name)


def _mxfp4(source: TensorSource) -> Iterator[tuple[str, _View]]:
    """gpt-oss's: [E, O, I / 32, 16] bytes, and an exponent for each 16 of them."""
    for name in source.shapes:
        if name.endswith("_blocks"):
            yield name.removesuffix("_blocks"), _Bytes(source, name, 3, 1)
        elif name.endswith("_scales"):
            yield name.removesuffix("s"), _Plain(source, name)
        else:
            yield name, _Plain(source, name)


def _compressed_tensors(source: TensorSource) -> Iterator[tuple[str, _View]]:
    """As llm-compressor's: numbers packed into words, and the shapes that they then have no more."""
    for name in source.shapes:
        if name.endswith(".weight_packed"):
            yield name.removesuffix("_packed"), _Bytes(source, name, 2, 4)
        elif not name.endswith(".weight_shape"):
            yield name, _Plain(source, name)


def _turned(source: TensorSource, method: "_WordLayout") -> Iterator[tuple[str, _View]]:
    """Checkpoints that have [I, O], in words of 32 bits."""
    # A tensor is read a few rows at a time, so the last one is kept.
    whole = functools.lru_cache(maxsize=1)(lambda convert, name: convert(source.read(name, (slice(None),) * 2)))

    def repacked(name: str, convert: Callable[[np.ndarray], np.ndarray], rows: int, columns: int) -> _Repacked:
        return _Repacked(functools.partial(whole, convert, name), (rows, columns))

    for name, shape in source.shapes.items():
        module, _, kind = name.rpartition(".")
        if kind in ("qweight", "qzeros", "scales") and len(shape) != 2:
            raise CheckpointError(f"tensor {name}: shape {tuple(shape)}, not a matrix")
        if kind == "qweight":
            outputs, inputs = method.sizes(*shape)
            yield f"{module}.weight", repacked(name, method.weight, outputs, inputs // 2)
        elif kind == "qzeros":
            yield f"{module}.weight_zero", repacked(name, method.zeros, shape[1] * _PER_WORD, shape[0])
        elif kind == "scales":
            yield f"{module}.weight_scale", repacked(name, np.transpose, shape[1], shape[0])
        elif kind != "g_idx":  # without reordered activations, each input's block is where it is
            yield name, _Plain(source, name)


class _WordLayout(Protocol):
    """How a tool packs numbers into words."""

    def sizes(self, rows: int, columns: int) -> tuple[int, int]:
        """Outputs and inputs of a matrix of words."""
        ...

    def weight(self, words: np.ndarray) -> np.ndarray:
        """u8[O, I / 2] of a matrix's words."""
        ...

    def zeros(self, words: np.ndarray) -> np.ndarray:
        """u8[O, blocks] of the zero points' words."""
        ...


class _Gptq:
    """Words along the inputs; zero points along the outputs, one less than they are."""

    def sizes(self, rows: int, columns: int) -> tuple[int, int]:
        return columns, rows * _PER_WORD

    def weight(self, words: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(words.T).view(np.uint8)

    def zeros(self, words: np.ndarray) -> np.ndarray:
        return (_unpack(words) + np.uint8(1)).T


class _Awq:
    """All words along the outputs, whose columns are shuffled."""

    def sizes(self, rows: int, columns: int) -> tuple[int, int]:
        return columns * _PER_WORD, rows

    def weight(self, words: np.ndarray) -> np.ndarray:
        code_OI = self.zeros(words)
        return code_OI[:, ::2] | (code_OI[:, 1::2] << 4)

    def zeros(self, words: np.ndarray) -> np.ndarray:
        code = _unpack(words).reshape(len(words), -1, _PER_WORD)
        return np.ascontiguousarray(code[..., np.argsort(_AWQ_ORDER)].reshape(len(words), -1).T)


def _unpack(words: np.ndarray) -> np.ndarray:
    """u8[rows, 8 * columns]: the numbers of each word, lowest first."""
    pairs = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(words), -1)


_METHODS: Mapping[str, Callable[[TensorSource], Iterator[tuple[str, _View]]]] = {
    "awq": functools.partial(_turned, method=_Awq()),
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gptq": functools.partial(_turned, method=_Gptq()),
    "mxfp4": _mxfp4,
}
