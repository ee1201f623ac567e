"""What the TPU kernel of the grouped matmul does with a block of rows and a block of a matrix, by the matrix's format.

Dimension key: see `backend`; B bytes of a row of a matrix, g groups of them with a scale.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.api import Matrices
from kernels_pallas.mxu import mxu_dot
from kernels_pallas.pallas import pl
from kernels_pallas.quantized import INT4_ZERO, QuantizedFormat, QuantizedRows, f32_scales, float4

LANES = 128
# Bytes of temporaries per byte of a quantised matrix: f32 and i32, twice.
_GROUPED_WORK = 16


class Problem(NamedTuple):
    """A kernel and its operands, in the order of its arguments.

    Attributes:
        kernel: body of the kernel, whose first argument is the index of the block of outputs.
        rows: rows to multiply, [P, ...] or [T, ...].
        by_output: arrays with an entry per output of a matrix, [X, O, ...].
        by_input: arrays whose last axis is outputs, [X, I or 1, O].
        constants: arrays that all steps share.
        scalars: scalars of each matrix, [X, ...].
        work: bytes that a step needs per byte of a matrix's block.
    """

    kernel: Callable[..., None]
    rows: tuple[jax.Array, ...]
    by_output: tuple[jax.Array, ...] = ()
    by_input: tuple[jax.Array, ...] = ()
    constants: tuple[jax.Array, ...] = ()
    scalars: tuple[jax.Array, ...] = ()
    work: int = 1


def make_problem(x: jax.Array | QuantizedRows, matrices: Matrices, *, transposed: bool) -> Problem:
    """Return the kernel for rows and matrices of a format; see `GroupedMatmul`."""
    w_XOI, scale_Xoi, zero_Xoi, format, _ = matrices
    if isinstance(x, QuantizedRows):
        return _quantized_problem(x, matrices)
    if transposed:
        return Problem(_multiply_transposed_block, (x,), by_input=(w_XOI,))
    if format is None or scale_Xoi is None:
        return Problem(_multiply_block, (x,), (w_XOI,))
    if format.block[0] > 1:
        scale_Xoi, transposed = _without_padding(scale_Xoi)
        kernel = partial(_multiply_scaled_block, transposed=transposed)
        return Problem(kernel, (x,), (w_XOI,), scalars=(scale_Xoi,))
    if format.block == (1, 0) and format.per_byte == 1:
        return Problem(_multiply_scaled_rows, (x,), (w_XOI,), by_input=(scale_Xoi.swapaxes(1, 2),))
    # Rows are split instead of bytes: the inputs of the lower halves of the bytes, then those of the upper halves.
    rows = tuple(x[:, part :: format.per_byte] for part in range(format.per_byte))
    by_output = (w_XOI, scale_Xoi, *(() if zero_Xoi is None else (zero_Xoi,)))
    num_bytes, num_groups = w_XOI.shape[2], scale_Xoi.shape[2]
    group_bytes = (format.block[1] or num_bytes * format.per_byte) // format.per_byte
    # A product with this matrix expands values per group to values per byte: alternatives across lanes are slower.
    group_1B = lax.broadcasted_iota(jnp.int32, (1, num_bytes), 1) // group_bytes
    spread_gB = (lax.broadcasted_iota(jnp.int32, (num_groups, 1), 0) == group_1B).astype(jnp.float32)
    kernel = partial(_multiply_grouped_block, format=format, zeros=zero_Xoi is not None)
    return Problem(kernel, rows, by_output, constants=(spread_gB,), work=_GROUPED_WORK)


def _quantized_problem(rows: QuantizedRows, matrices: Matrices) -> Problem:
    w_XOI, scale_Xoi, _, format, _ = matrices
    assert format is not None
    assert scale_Xoi is not None
    of_rows = (rows.values_TI, rows.scale_iT.T)
    if format.block[0] == 1:
        return Problem(_multiply_quantized_block, of_rows, (w_XOI,), by_input=(scale_Xoi.swapaxes(1, 2),))
    scale_Xoi, transposed = _without_padding(scale_Xoi)
    kernel = partial(_multiply_quantized_scaled_block, transposed=transposed)
    return Problem(kernel, of_rows, (w_XOI,), scalars=(scale_Xoi,))


def _without_padding(scale_Xoi: jax.Array) -> tuple[jax.Array, bool]:
    """Transpose scales of one column, which would be padded to 128; return them, and whether they are transposed."""
    single = scale_Xoi.shape[2] == 1
    return (scale_Xoi.swapaxes(1, 2) if single else scale_Xoi), single


def _multiply_transposed_block(_: Any, x_WI: Any, w_1Io: Any, out_Wo: Any) -> None:
    out_Wo[...] = mxu_dot(x_WI[...], w_1Io[0], contract=0).astype(out_Wo.dtype)


def _multiply_block(_: Any, x_WI: Any, w_1oI: Any, out_Wo: Any) -> None:
    out_Wo[...] = mxu_dot(x_WI[...], w_1oI[0], contract=1).astype(out_Wo.dtype)


def _multiply_scaled_rows(_: Any, x_WI: Any, w_1oI: Any, scale_11o: Any, out_Wo: Any) -> None:
    """Like `_multiply_block`, for matrices with a scale per output."""
    out_Wo[...] = (mxu_dot(x_WI[...], w_1oI[0], contract=1) * f32_scales(scale_11o[0])).astype(out_Wo.dtype)


def _multiply_scaled_block(
    output: jax.Array, x_WI: Any, w_1oI: Any, scale_1oi: Any, out_Wo: Any, *, transposed: bool
) -> None:
    """Like `_multiply_block`, one block of columns at a time: the products are scaled instead of the matrix."""

    def scale(column: jax.Array) -> jax.Array:
        return _column_scales(scale_1oi, output, column, out_Wo.shape[1], transposed=transposed)

    _sum_up_columns(x_WI, w_1oI, scale, out_Wo)


def _multiply_quantized_scaled_block(
    output: jax.Array, x_WI: Any, scale_Wi: Any, w_1oI: Any, scale_1oi: Any, out_Wo: Any, *, transposed: bool
) -> None:
    """Like `_multiply_scaled_block`, for rows that have the elements of the matrix, and scales for as many inputs."""
    column_1i = lax.broadcasted_iota(jnp.int32, (1, scale_Wi.shape[1]), 1)

    def scale(column: jax.Array) -> jax.Array:
        # Vectors cannot be indexed by a lane that is not static.
        scale_W1 = jnp.sum(jnp.where(column_1i == column, scale_Wi[...], 0), axis=1, keepdims=True)
        return scale_W1 * _column_scales(scale_1oi, output, column, out_Wo.shape[1], transposed=transposed)

    _sum_up_columns(x_WI, w_1oI, scale, out_Wo)


def _sum_up_columns(x_WI: Any, w_1oI: Any, scale: Callable[[jax.Array], jax.Array], out_Wo: Any) -> None:
    """Add up the products with each block of columns, times its scales, [W or 1, o]."""

    def multiply(column: jax.Array, sum_Wo: jax.Array) -> jax.Array:
        columns = pl.ds(pl.multiple_of(column * LANES, LANES), LANES)
        return sum_Wo + mxu_dot(x_WI[:, columns], w_1oI[0, :, columns], contract=1) * scale(column)

    num_columns = x_WI.shape[1] // LANES
    out_Wo[...] = lax.fori_loop(0, num_columns, multiply, jnp.zeros(out_Wo.shape, jnp.float32)).astype(out_Wo.dtype)


def _column_scales(
    scale_1oi: Any, output: jax.Array, column: jax.Array, num_outputs: int, *, transposed: bool
) -> jax.Array:
    """Return the scales of a block of columns for a block of outputs, f32[1, o]."""
    num_rows = num_outputs // LANES
    last_row = scale_1oi.shape[2 if transposed else 1] - 1
    # The last block of outputs may be partial.
    places = [(jnp.minimum(output * num_rows + row, last_row), column) for row in range(num_rows)]
    scales = [scale_1oi[0, *(place[::-1] if transposed else place)] for place in places]
    return jnp.concatenate([jnp.full((1, LANES), scale, jnp.float32) for scale in scales], axis=1)


def _multiply_quantized_block(_: Any, x_WI: Any, scale_W1: Any, w_1oI: Any, scale_11o: Any, out_Wo: Any) -> None:
    """Multiply 8-bit elements, and scale the sums: exact ones of int8, in f32 of fp8."""
    sums = jnp.int32 if x_WI.dtype == jnp.int8 else jnp.float32
    sum_Wo = lax.dot_general(x_WI[...], w_1oI[0], (((1,), (1,)), ((), ())), preferred_element_type=sums)
    out_Wo[...] = (sum_Wo.astype(jnp.float32) * scale_W1[...] * f32_scales(scale_11o[0])).astype(out_Wo.dtype)


def _multiply_grouped_block(_: Any, *refs: Any, format: QuantizedFormat, zeros: bool) -> None:
    """Like `_multiply_block`, for matrices with a scale per output and group of inputs."""
    rows_WI, of_matrix, (spread_gB, out_Wo) = refs[: format.per_byte], refs[format.per_byte : -2], refs[-2:]
    w_1oB, scale_1og = of_matrix[:2]
    spread = partial(mxu_dot, right=spread_gB[...], contract=0)
    scale_oB = spread(f32_scales(scale_1og[0]))
    middle = spread(of_matrix[2][0].astype(jnp.int32).astype(jnp.float32)) if zeros else INT4_ZERO
    sum_Wo = jnp.zeros(out_Wo.shape, jnp.float32)
    for part, x_WI in enumerate(rows_WI):
        if format.per_byte == 1:
            w_oB = w_1oB[0].astype(jnp.float32)
        else:
            code_oB = (w_1oB[0].astype(jnp.int32) >> (4 * part)) & 15
            w_oB = float4(code_oB) if format.element_type == "mxfp4" else code_oB.astype(jnp.float32) - middle
        sum_Wo += mxu_dot(x_WI[...], (w_oB * scale_oB).astype(x_WI.dtype), contract=1)
    out_Wo[...] = sum_Wo.astype(out_Wo.dtype)
