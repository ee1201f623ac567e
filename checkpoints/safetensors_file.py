"""Reads the safetensors format, without mmap so that only the requested data is resident in memory.

Layout: u64 length of the header, the header as JSON (name -> dtype, shape, [begin, end) offsets), then the data.
The header is untrusted input: every offset is checked against the file before any data is read.
"""

import math
import os
import struct
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import msgspec
import numpy as np

from checkpoints.source import CheckpointError, Index

_MAX_HEADER_BYTES = 100 << 20
_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Tensor(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """One open `.safetensors` file.

    Raises:
        CheckpointError: the header does not describe the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        try:
            self._tensors = self._read_header()
        except BaseException:
            self._file.close()
            raise

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in the file."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """Read `tensor[index]`; leading rows outside the index are not read."""
        tensor = self._tensors[name]
        if not tensor.shape:
            return self._read_rows(tensor, 0, 1).reshape(())
        first, last, step = index[0].indices(tensor.shape[0]) if index else (0, tensor.shape[0], 1)
        if step != 1:
            raise ValueError(f"strided reads are not supported, got step {step}")
        return self._read_rows(tensor, first, last)[(slice(None), *index[1:])]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read_rows(self, tensor: _Tensor, first: int, last: int) -> np.ndarray:
        row_shape = tensor.shape[1:]
        row_bytes = math.prod(row_shape) * tensor.dtype.itemsize
        out = np.empty((last - first, *row_shape), tensor.dtype)
        view = memoryview(out.reshape(-1).view(np.uint8))
        self._file.seek(tensor.offset + first * row_bytes)
        if self._file.readinto(view) != len(view):
            raise CheckpointError(f"{self._path}: file ends inside a tensor")
        return out

    def _read_header(self) -> dict[str, _Tensor]:
        size = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{self._path}: header of {length} bytes in a file of {size}")
        try:
            header: dict[str, msgspec.Raw] = msgspec.json.decode(self._file.read(length), type=dict[str, msgspec.Raw])
            entries = {
                name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items() if name != "__metadata__"
            }
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise CheckpointError(f"{self._path}: header is not valid: {error}") from None
        data_start = 8 + length
        tensors: dict[str, _Tensor] = {}
        end_of_last = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
            begin, end = entry.data_offsets
            if entry.dtype not in _DTYPES:
                raise CheckpointError(f"{self._path}: tensor {name} has unknown dtype {entry.dtype}")
            dtype = _DTYPES[entry.dtype]
            if any(size < 0 for size in entry.shape) or math.prod(entry.shape) * dtype.itemsize != end - begin:
                raise CheckpointError(
                    f"{self._path}: tensor {name}: shape {entry.shape} does not fill {end - begin} bytes"
                )
            if begin < end_of_last:
                raise CheckpointError(f"{self._path}: tensor {name}: bytes {begin}..{end} overlap another tensor's")
            if data_start + end > size:
                raise CheckpointError(
                    f"{self._path}: ends at byte {size}, before tensor {name} does, which takes bytes "
                    f"{data_start + begin} to {data_start + end}"
                )
            end_of_last = end
            tensors[name] = _Tensor(dtype, tuple(entry.shape), data_start + begin)
        return tensors
