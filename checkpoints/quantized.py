"""Presents quantised tensors under one set of names and in one layout, whatever tool wrote them.

`NAME` contains the elements of a matrix [O, I], or bytes of two 4-bit elements [O, I / 2], the first in the lower half;
`NAME_scale` the scales of its blocks [O / rows, I / columns], and `NAME_zero` u8 zero points if blocks have them.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from checkpoints.source import CheckpointError, Index, TensorSource

# The zero point of int4 matrices that store none, and the values of float4_e2m1fn by code.
_INT4_ZERO = np.float32(8)
_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_PER_WORD = 8  # 4-bit elements in 32 bits
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output columns of a word's elements, lowest bits first


class _View(Protocol):
    """A tensor derived from one in the source checkpoint."""

    shape: tuple[int, ...]

    def read(self, index: Index) -> np.ndarray:
        """Read part of the tensor."""
        ...


_Views: TypeAlias = dict[str, _View]


class QuantizedCheckpoint:
    """The tensors of another checkpoint under the names and in the layout described above."""

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
    """Return the checkpoint with quantised tensors as described above; unchanged without a known `quant_method`."""
    quantization = source.config.get("quantization_config") or source.config.get("compression_config") or {}
    views = _METHODS.get(str(quantization.get("quant_method")))
    return source if views is None else QuantizedCheckpoint(source, views)


class Quantizer(NamedTuple):
    """Quantises matrices by rounding to nearest.

    Attributes:
        dtype: int8, float8_e4m3fn, or uint8 for two signed 4-bit integers in a byte, each stored with 8 added.
        columns: number of columns that share a scale; 0 means a whole row.
        scale_dtype: dtype of the scales.
    """

    dtype: np.dtype
    columns: int
    scale_dtype: np.dtype

    def scales(self, w: np.ndarray) -> np.ndarray:
        """Return the scales [..., O, I / columns] of a weight [..., O, I]."""
        return self._scales(self._blocks(w))

    def elements(self, w: np.ndarray) -> np.ndarray:
        """Return the quantised elements of a weight [..., O, I]; 4-bit elements are packed two to a byte."""
        blocks = self._blocks(w)
        # Elements are divided by the scale as rounded to `scale_dtype`.
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
        """Return f32[..., O, I / columns, columns]; the last block is padded with zeros."""
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
        """Number of elements in a byte."""
        return 2 if self.dtype == np.uint8 else 1


def quantizing(source: TensorSource, names: Set[str], quantizer: Quantizer) -> TensorSource:
    """Return the checkpoint with the tensors of these names quantised while they are read."""

    def views(source: TensorSource) -> Iterator[tuple[str, _View]]:
        for name in source.shapes:
            if name in names:
                yield name, _Quantized(source, name, quantizer, scale=False)
                yield f"{name}_scale", _Quantized(source, name, quantizer, scale=True)
            else:
                yield name, _Plain(source, name)

    return QuantizedCheckpoint(source, views)


class _Quantized:
    """The quantised elements of a tensor, or its scales."""

    def __init__(self, source: TensorSource, tensor: str, quantizer: Quantizer, *, scale: bool) -> None:
        *lead, size = source.shapes[tensor]
        num_scales = -(-size // (quantizer.columns or size))
        self.shape = (*lead, num_scales if scale else size // quantizer.per_byte)
        self._source, self._tensor, self._quantizer, self._scale = source, tensor, quantizer, scale

    def read(self, index: Index) -> np.ndarray:
        """Read part of the tensor; source rows are read whole."""
        index = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        whole = self._source.read(self._tensor, (*index[:-1], slice(None)))
        made = self._quantizer.scales(whole) if self._scale else self._quantizer.elements(whole)
        return made[..., index[-1]]


class Dequantizer(NamedTuple):
    """Dequantises matrices.

    Attributes:
        element_type: `fp8`, `int8`, `int4` (codes with a zero point, 8 unless stored) or `mxfp4` (float4_e2m1fn).
        block: rows and columns that share a scale; 0 columns mean a whole row.
    """

    element_type: str
    block: tuple[int, int]

    @property
    def per_byte(self) -> int:
        """Number of elements in a byte."""
        return 2 if self.element_type in ("int4", "mxfp4") else 1

    def elements(self, values: np.ndarray) -> np.ndarray:
        """Return stored elements [O, I] in f32, before zero points and scales."""
        if self.per_byte == 1:
            return values.astype(np.float32)
        code = np.stack([values & 15, values >> 4], axis=-1).reshape(len(values), -1)
        return _FLOAT4[code] if self.element_type == "mxfp4" else code.astype(np.float32)


def dequantizing(source: TensorSource, names: Set[str], dequantizer: Dequantizer) -> TensorSource:
    """Return the checkpoint with the tensors of these names in f32, without their scales and zero points."""
    parts = {f"{name}_{part}" for name in names for part in ("scale", "zero")}

    def views(source: TensorSource) -> Iterator[tuple[str, _View]]:
        for name in source.shapes:
            if name not in parts:
                yield name, _Dequantized(source, name, dequantizer) if name in names else _Plain(source, name)

    return QuantizedCheckpoint(source, views)


class _Dequantized:
    """The weight that a tensor, its scales and its zero points stand for."""

    def __init__(self, source: TensorSource, tensor: str, dequantizer: Dequantizer) -> None:
        num_rows, num_columns = source.shapes[tensor]
        self.shape = (num_rows, num_columns * dequantizer.per_byte)
        self._source, self._tensor, self._dequantizer = source, tensor, dequantizer

    def read(self, index: Index) -> np.ndarray:
        """Read part of the tensor; source rows are read whole."""
        first, end, _ = index[0].indices(self.shape[0])
        w_OI = self._dequantizer.elements(self._source.read(self._tensor, (slice(first, end),)))
        if f"{self._tensor}_zero" in self._source.shapes:
            w_OI = w_OI - self._of_blocks("zero", first, end).astype(np.float32)
        elif self._dequantizer.element_type == "int4":
            w_OI = w_OI - _INT4_ZERO
        scale_OI = self._of_blocks("scale", first, end)
        if scale_OI.dtype == np.uint8:
            # Exponents of two with bias 127; an exponent of 0 is 0.
            scale_OI = (scale_OI.astype(np.uint32) << 23).view(np.float32)
        columns = index[1] if len(index) > 1 else slice(None)
        return (w_OI * scale_OI.astype(np.float32))[:, columns]

    def _of_blocks(self, part: str, first: int, end: int) -> np.ndarray:
        """Return the scales or zero points of some rows, repeated for all elements of their blocks."""
        rows, columns = self._dequantizer.block
        blocks = self._source.read(f"{self._tensor}_{part}", (slice(first // rows, -(-end // rows)),))
        by_row = np.repeat(blocks, rows, axis=0)[first % rows :][: end - first]
        return np.repeat(by_row, columns or self.shape[1], axis=1)[:, : self.shape[1]]


class _Plain:
    """An unchanged tensor."""

    def __init__(self, source: TensorSource, tensor: str) -> None:
        self.shape = tuple(source.shapes[tensor])
        self._source, self._tensor = source, tensor

    def read(self, index: Index) -> np.ndarray:
        """Read part of the tensor."""
        return self._source.read(self._tensor, index)


class _Bytes:
    """A tensor whose last axes are read as one axis of bytes.

    Args:
        source: checkpoint that contains the tensor.
        tensor: name of the tensor.
        num_axes: number of axes of the result.
        itemsize: bytes per entry of the tensor.
    """

    def __init__(self, source: TensorSource, tensor: str, num_axes: int, itemsize: int) -> None:
        shape = source.shapes[tensor]
        if len(shape) < num_axes:
            raise CheckpointError(f"tensor {tensor}: shape {tuple(shape)} has fewer than {num_axes} axes")
        self.shape = (*shape[: num_axes - 1], int(np.prod(shape[num_axes - 1 :])) * itemsize)
        self._source, self._tensor, self._itemsize = source, tensor, itemsize

    def read(self, index: Index) -> np.ndarray:
        """Read part of the tensor."""
        index = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        values = np.ascontiguousarray(self._source.read(self._tensor, index[:-1]))
        if values.dtype.itemsize != self._itemsize:
            raise CheckpointError(f"tensor {self._tensor} is {values.dtype}, not of {8 * self._itemsize} bits")
        return values.view(np.uint8).reshape(*values.shape[: len(self.shape) - 1], -1)[..., index[-1]]


class _Repacked:
    """A tensor that is read whole and repacked; it is cached until another one is read.

    Args:
        read_whole: reads and repacks the tensor.
        shape: shape of the result.
    """

    def __init__(self, read_whole: Callable[[], np.ndarray], shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._read_whole = read_whole

    def read(self, index: Index) -> np.ndarray:
        """Read part of the tensor."""
        return self._read_whole()[index]


def _fp8(source: TensorSource) -> Iterator[tuple[str, _View]]:
    """Yield the tensors of DeepSeek's format, whose scales are called `weight_scale_inv`."""
    for name in source.shapes:
        yield name.removesuffix("_inv") if name.endswith(".weight_scale_inv") else name, _Plain(source, name)


def _mxfp4(source: TensorSource) -> Iterator[tuple[str, _View]]:
    """Yield the tensors of gpt-oss's format: [E, O, I / 32, 16] bytes, and an exponent for each 16 of them."""
    for name in source.shapes:
        if name.endswith("_blocks"):
            yield name.removesuffix("_blocks"), _Bytes(source, name, 3, 1)
        elif name.endswith("_scales"):
            yield name.removesuffix("s"), _Plain(source, name)
        else:
            yield name, _Plain(source, name)


def _compressed_tensors(source: TensorSource) -> Iterator[tuple[str, _View]]:
    """Yield the tensors of llm-compressor's format: elements packed into words; their unpacked shapes are left out."""
    for name in source.shapes:
        if name.endswith(".weight_packed"):
            yield name.removesuffix("_packed"), _Bytes(source, name, 2, 4)
        elif not name.endswith(".weight_shape"):
            yield name, _Plain(source, name)


def _turned(source: TensorSource, method: "_WordLayout") -> Iterator[tuple[str, _View]]:
    """Yield the tensors of formats that store [I, O], packed into 32-bit words."""
    # A tensor is read a few rows at a time, so the last one is cached.
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
        elif kind != "g_idx":  # the block of each input; redundant unless activations are reordered
            yield name, _Plain(source, name)


class _WordLayout(Protocol):
    """The way in which a tool packs elements into words."""

    def sizes(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the number of outputs and the number of inputs of a matrix of words."""
        ...

    def weight(self, words: np.ndarray) -> np.ndarray:
        """Return u8[O, I / 2] from a matrix of words."""
        ...

    def zeros(self, words: np.ndarray) -> np.ndarray:
        """Return u8[O, blocks] from the words of the zero points."""
        ...


class _Gptq:
    """GPTQ: weights packed along the inputs; zero points packed along the outputs, stored with 1 subtracted."""

    def sizes(self, rows: int, columns: int) -> tuple[int, int]:
        return columns, rows * _PER_WORD

    def weight(self, words: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(words.T).view(np.uint8)

    def zeros(self, words: np.ndarray) -> np.ndarray:
        return (_unpack(words) + np.uint8(1)).T


class _Awq:
    """AWQ: weights and zero points packed along the outputs, in the order `_AWQ_ORDER`."""

    def sizes(self, rows: int, columns: int) -> tuple[int, int]:
        return columns * _PER_WORD, rows

    def weight(self, words: np.ndarray) -> np.ndarray:
        code_OI = self.zeros(words)
        return code_OI[:, ::2] | (code_OI[:, 1::2] << 4)

    def zeros(self, words: np.ndarray) -> np.ndarray:
        code = _unpack(words).reshape(len(words), -1, _PER_WORD)
        return np.ascontiguousarray(code[..., np.argsort(_AWQ_ORDER)].reshape(len(words), -1).T)


def _unpack(words: np.ndarray) -> np.ndarray:
    """Return u8[rows, 8 * columns]: the elements of each word, lowest bits first."""
    pairs = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(words), -1)


_METHODS: Mapping[str, Callable[[TensorSource], Iterator[tuple[str, _View]]]] = {
    "awq": functools.partial(_turned, method=_Awq()),
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gptq": functools.partial(_turned, method=_Gptq()),
    "mxfp4": _mxfp4,
}
