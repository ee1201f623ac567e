"""Grouped matmuls whose results are known: matrices of every format, and rows spread over groups in several ways.

Dimension key: R rows, X matrices, I inputs, O outputs; for heads: T tokens, N heads, J channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.grouped_matmul.api import ExpertShape, GroupedMatmul, HeadMatmul, HeadMatrices, Matrices
from kernels_pallas.grouped_matmul.reference import grouped_matmul
from kernels_pallas.kernel_case import KernelCase
from kernels_pallas.quantized import QuantizedFormat, QuantizedRows, quantize_rows
from kernels_pallas.token_tiles import sort_into_blocks

# The case runs the second of three layers.
_NUM_LAYERS, _LAYER = 3, 1
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])

# Values, scales and zero points.
MatrixArrays = tuple[jax.Array, jax.Array | None, jax.Array | None]
# (number of groups, number of rows) -> group of each row; the number of groups for rows without one.
Spread = Callable[[int, int], np.ndarray]


def evenly(num_groups: int, num_rows: int) -> np.ndarray:
    """Rows of all groups."""
    return np.random.default_rng(2).integers(0, num_groups, num_rows)


def half_elsewhere(num_groups: int, num_rows: int) -> np.ndarray:
    """Rows of which half have no group, as if their experts were on other devices."""
    return np.random.default_rng(3).integers(0, 2 * num_groups, num_rows).clip(max=num_groups)


def all_in_one(num_groups: int, num_rows: int) -> np.ndarray:
    """Rows of one group."""
    return np.full(num_rows, max(0, num_groups - 2))


def all_elsewhere(num_groups: int, num_rows: int) -> np.ndarray:
    """Rows without a group."""
    return np.full(num_rows, num_groups)


SPREADS: Mapping[str, Spread] = {
    "spread evenly": evenly,
    "half elsewhere": half_elsewhere,
    "in one group": all_in_one,
    "all elsewhere": all_elsewhere,
}


def random_matrices(
    shape: tuple[int, int, int], format: QuantizedFormat, *, zeros: bool = False, scale_dtype: Any = jnp.float32
) -> tuple[Matrices, np.ndarray]:
    """Return quantised matrices, and the same matrices dequantised, f64[X, O, I].

    Args:
        shape: (X, O, I).
        format: format of the matrices.
        zeros: whether they have zero points.
        scale_dtype: dtype of the scales; u8 for exponents.
    """
    number, num_outputs, num_inputs = shape
    rows, columns = format.block[0], format.block[1] or num_inputs
    scales = (number, -(-num_outputs // rows), -(-num_inputs // columns))
    rng = np.random.default_rng(5)

    def over_blocks(x_Xoi: np.ndarray) -> np.ndarray:
        return np.repeat(np.repeat(x_Xoi, rows, 1), columns, 2)[:, :num_outputs, :num_inputs]

    zero = rng.integers(0, 16, scales) if zeros else None
    if format.per_byte == 2:
        code = rng.integers(0, 16, shape)
        values = jnp.asarray(code[..., ::2] | code[..., 1::2] << 4, jnp.uint8)
        elements = _E2M1[code] if format.element_type == "mxfp4" else code - (8 if zero is None else over_blocks(zero))
    else:
        values = jnp.asarray(rng.uniform(-100, 100, shape), format.dtype)
        elements = np.asarray(values, np.float64)
    size = 1 / (np.abs(elements).max() * num_inputs**0.5)
    if scale_dtype == jnp.uint8:
        exponent = rng.integers(-2, 3, scales) + int(np.log2(size))
        scale, scale64 = jnp.asarray(exponent + 127, jnp.uint8), np.exp2(exponent)
    else:
        scale = jnp.asarray(rng.uniform(0.5, 2, scales) * size, scale_dtype)
        scale64 = np.asarray(scale, np.float64)
    matrices = Matrices(values, scale, None if zero is None else jnp.asarray(zero, jnp.uint8), format)
    return matrices, elements * over_blocks(scale64)


@dataclass(frozen=True, kw_only=True)
class GroupedCase:
    """Rows and matrices.

    Attributes:
        shape: shape of each matrix.
        num_groups: matrices of a layer.
        group_R: group of each row; `num_groups` for rows without one.
        scale_dtype: dtype of the scales of quantised matrices.
        quantized_rows: whether the rows are quantised, too.
    """

    shape: ExpertShape
    num_groups: int
    group_R: np.ndarray
    scale_dtype: Any = jnp.float32
    quantized_rows: bool = False

    @property
    def tolerance(self) -> tuple[float, float]:
        """Absolute and relative tolerances for results near 1: f32 sums of rounded inputs, rounded."""
        # Weights are dequantised to the dtype of the rows.
        return (1e-5, 0.0) if self.shape.rows_dtype == jnp.float32 else (0.01, 2**-7)

    def matrices(self) -> tuple[Matrices, np.ndarray]:
        """Return the matrices of three layers, and those of the case's layer in f64; the others must not be read."""
        shape, number = self.shape, _NUM_LAYERS * self.num_groups
        used = slice(_LAYER * self.num_groups, (_LAYER + 1) * self.num_groups)
        sizes = (number, shape.num_outputs, shape.num_inputs)
        if shape.format is not None:
            matrices, w64_XOI = random_matrices(sizes, shape.format, zeros=shape.zeros, scale_dtype=self.scale_dtype)
            return matrices, w64_XOI[used]
        w_XOI = np.full(sizes, np.nan, np.float32)
        w_XOI[used] = np.random.default_rng(4).standard_normal((self.num_groups, *sizes[1:])) / shape.num_inputs**0.5
        w_XOI[_LAYER * self.num_groups + np.setdiff1d(np.arange(self.num_groups), self.group_R)] = np.nan
        values = jnp.asarray(w_XOI.swapaxes(1, 2) if shape.transposed else w_XOI, shape.rows_dtype)
        w64_XOI = np.asarray(values[used], np.float64)
        return Matrices(values), w64_XOI.swapaxes(1, 2) if shape.transposed else w64_XOI


def grouped_case(matmul: GroupedMatmul, case: GroupedCase) -> KernelCase:
    """Return rows that are sorted into blocks, multiplied by matrices of the second of three layers, and put back."""
    shape, num_rows = case.shape, len(case.group_R)
    matrices, w64_GOI = case.matrices()
    x_RI = jnp.asarray(np.random.default_rng(num_rows).standard_normal((num_rows, shape.num_inputs)), shape.rows_dtype)
    block_rows = matmul.block_rows(num_rows, case.num_groups, shape.num_inputs * jnp.dtype(shape.rows_dtype).itemsize)
    quantized: QuantizedRows | None = None
    x64_RI = np.asarray(x_RI, np.float64)
    if case.quantized_rows:
        assert shape.format is not None
        quantized = quantize_rows(x_RI, shape.format)
        repeats = shape.num_inputs // quantized.scale_iT.shape[0]
        x64_RI = np.asarray(quantized.values_TI, np.float64)
        x64_RI *= np.repeat(np.asarray(quantized.scale_iT, np.float64).T, repeats, axis=1)

    def run(x: jax.Array | QuantizedRows, group_R: jax.Array, first: jax.Array, arrays: MatrixArrays) -> jax.Array:
        blocks, permuted = sort_into_blocks(group_R, case.num_groups, block_rows, first_group=first)
        matrices = [Matrices(*arrays, format=shape.format)]
        multiply = partial(matmul, transposed=shape.transposed, out_dtype=shape.rows_dtype)
        (y_PO,) = multiply(x, matrices, blocks, row_P=permuted.row_P)
        return y_PO.at[permuted.block_row_R].get(mode="fill", fill_value=0)

    def verify(got_RO: jax.Array) -> None:
        assert got_RO.dtype == shape.rows_dtype
        here = case.group_R < case.num_groups
        want = grouped_matmul(x64_RI[here], w64_GOI, case.group_R[here])
        got = np.asarray(got_RO, np.float64)
        atol, rtol = case.tolerance
        np.testing.assert_allclose(got[here], want, atol=atol, rtol=rtol)
        assert not np.any(got[~here]), "rows without a group have results"

    group_R = jnp.asarray(case.group_R, jnp.int32)
    first = jnp.int32(_LAYER * case.num_groups)
    return KernelCase(run=run, arguments=(quantized or x_RI, group_R, first, matrices[:3]), verify=verify)


@dataclass(frozen=True, kw_only=True)
class HeadCase:
    """Heads with matrices of their own.

    Attributes:
        num_tokens, num_heads: T and N.
        num_rows: rows of keys of a head's matrix; as many of values follow.
        num_columns: columns of the matrices.
        num_channels: J, of which the first are multiplied.
        transposed: multiply by the rows of the keys, `x W`, instead of by those of the values, `x W^T`.
    """

    num_tokens: int
    num_heads: int
    num_rows: int
    num_columns: int
    num_channels: int
    transposed: bool


def head_case(matmul: HeadMatmul, case: HeadCase, *, atol: float = 0.02) -> KernelCase:
    """Return products of heads with the matrices of the second of two layers.

    Args:
        matmul: the implementation.
        case: the heads.
        atol: absolute tolerance of results near 1; XLA for CPU, which rounds sums to bf16, needs a larger one.
    """
    rng = np.random.default_rng(9)
    sizes = (2, case.num_heads * 2 * case.num_rows, case.num_columns)
    stack = jnp.asarray(rng.standard_normal(sizes) / 16, jnp.bfloat16)
    x_TNJ = jnp.asarray(rng.standard_normal((case.num_tokens, case.num_heads, case.num_channels)), jnp.bfloat16)
    first = 0 if case.transposed else case.num_rows

    def run(x_TNJ: jax.Array, stack: jax.Array, layer: jax.Array) -> jax.Array:
        matrices = HeadMatrices(stack, layer, 2 * case.num_rows, first, case.num_rows)
        return matmul(x_TNJ, matrices, transposed=case.transposed)

    def verify(got: jax.Array) -> None:
        w64_NRC = np.asarray(stack, np.float64)[1].reshape(case.num_heads, -1, case.num_columns)
        w64_NRC = w64_NRC[:, first : first + case.num_rows]
        used = case.num_rows if case.transposed else case.num_columns
        equation = "tnr,nrc->tnc" if case.transposed else "tnc,nrc->tnr"
        want = np.einsum(equation, np.asarray(x_TNJ, np.float64)[..., :used], w64_NRC)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=atol, rtol=2**-7)

    return KernelCase(run=run, arguments=(x_TNJ, stack, jnp.int32(1)), verify=verify)
