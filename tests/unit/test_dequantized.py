"""Weights that a model keeps in floating point are dequantised while a quantised checkpoint is read."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from checkpoints.quantized import Dequantizer, dequantizing
from kernels_pallas.quantized import QuantizedFormat, QuantizedMatrix, dequantize

OUTPUTS, INPUTS = 10, 24
_NAMES = ("w", "w_scale", "w_zero")


class Arrays:
    """A checkpoint of arrays in memory."""

    config: dict[str, Any]

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.config = {}
        self._arrays = arrays

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self._arrays.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._arrays[name][index]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("element_type", "block", "zeros"),
    [
        ("fp8", (4, 16), False),
        ("fp8", (1, 0), False),
        ("int8", (1, 0), False),
        ("int4", (1, 8), False),
        ("int4", (1, 8), True),
        ("mxfp4", (1, 8), False),
    ],
)
@pytest.mark.parametrize("index", [(slice(None),), (slice(3, 9), slice(5, 20)), (slice(4, 5),)])
def test_any_part_is_what_the_kernels_dequantise(
    element_type: Any, block: tuple[int, int], zeros: bool, index: tuple[slice, ...]
) -> None:
    format = QuantizedFormat(element_type, block)
    rng = np.random.default_rng(0)
    rows, columns = block
    blocks = (-(-OUTPUTS // rows), -(-INPUTS // columns) if columns else 1)
    values = rng.integers(0, 256, (OUTPUTS, INPUTS // format.per_byte)).astype(np.uint8)
    if element_type == "fp8":
        values = rng.standard_normal(values.shape).astype(ml_dtypes.float8_e4m3fn)
    elif element_type == "int8":
        values = values.view(np.int8)
    scale = rng.uniform(0.5, 2, blocks).astype(np.float32)
    if element_type == "mxfp4":
        scale = rng.integers(100, 140, blocks).astype(np.uint8)
    arrays = {"w": values, "w_scale": scale, "other": np.ones(3, np.float32)}
    if zeros:
        arrays["w_zero"] = rng.integers(0, 16, blocks).astype(np.uint8)
    source = dequantizing(Arrays(arrays), {"w"}, Dequantizer(element_type, block))
    assert source.shapes == {"w": (OUTPUTS, INPUTS), "other": (3,)}
    matrix = QuantizedMatrix(*(None if each is None else jnp.asarray(each) for each in map(arrays.get, _NAMES)))
    want = np.asarray(dequantize(matrix, format, jnp.float32))
    np.testing.assert_array_equal(source.read("w", index), want[index])
