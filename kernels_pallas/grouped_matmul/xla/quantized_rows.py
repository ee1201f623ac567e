"""Products of quantised rows with one matrix by XLA, which calls cuBLAS or uses the MXU for 8-bit elements."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from kernels_pallas.grouped_matmul.api import Matrices
from kernels_pallas.quantized import QuantizedFormat, QuantizedRows, f32_scales


def has_row_scales(format: QuantizedFormat) -> bool:
    """Return whether a matrix of 8-bit elements has one scale per row, so that XLA needs to scale only the results."""
    return format.per_byte == 1 and format.block == (1, 0)


def multiply_rows(rows: QuantizedRows, matrices: Matrices, group: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    """Return `x W^T` for one of several matrices with a scale per row, [T, O].

    Args:
        rows: rows with one scale each.
        matrices: matrices with the same elements.
        group: i32 scalar, index of the matrix.
        out_dtype: dtype of the results; sums are exact in i32, or in f32.
    """
    assert matrices.scale_Xoi is not None
    w_OI = lax.dynamic_index_in_dim(matrices.values_XOI, group, keepdims=False)
    scale_O = lax.dynamic_index_in_dim(matrices.scale_Xoi, group, keepdims=False)[:, 0]
    integers = jnp.issubdtype(w_OI.dtype, jnp.integer)
    sums_TO = lax.dot_general(
        rows.values_TI,
        w_OI,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32 if integers else jnp.float32,
    )
    scales_TO = rows.scale_iT[0][:, None] * f32_scales(scale_O)[None]
    return (sums_TO.astype(jnp.float32) * scales_TO).astype(out_dtype)
