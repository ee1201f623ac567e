"""Matrices of small numbers with a factor for each block of them, and what they stand for.

Numbers of 4 bits lie two in a byte, the first in its lower half: a row of I numbers is I / 2 bytes.

Dimension key: O outputs, I inputs, o and i blocks of them.
"""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

ElementType: TypeAlias = Literal["fp8", "int8", "int4", "mxfp4"]

# The zero point of 4-bit integers that have no zero points of their own.
INT4_ZERO = 8.0
_F32_MANTISSA_BITS = 23


class QuantizedFormat(NamedTuple):
    """How matrices are quantised.

    Attributes:
        element_type: float8_e4m3fn, int8, 4 bits above a zero point, or float4_e2m1fn (OCP Microscaling Formats, 1.0).
        block: rows and columns that share a factor; 0 columns are a whole row. The last ones may have fewer.
    """

    element_type: ElementType
    block: tuple[int, int]

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the stored weights."""
        return jnp.dtype({"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}.get(self.element_type, jnp.uint8))

    @property
    def per_byte(self) -> int:
        """Values in a byte."""
        return 2 if self.element_type in ("int4", "mxfp4") else 1


class QuantizedMatrix(NamedTuple):
    """One matrix, or several along leading axes.

    Attributes:
        values: [O, I], or [O, I / 2] of 4 bits.
        scale_oi: the factors: floating point, or u8 exponents of two above -127 (e8m0).
        zero_oi: u8 zero points of 4-bit integers, where each block has its own; else None.
    """

    values: jax.Array
    scale_oi: jax.Array
    zero_oi: jax.Array | None = None


def dequantize(matrix: QuantizedMatrix, format: QuantizedFormat, dtype: DTypeLike) -> jax.Array:
    """[O, I]: each number above its zero point, times its block's factor; products are in f32."""
    w_OI = _elements(matrix.values, format)
    if matrix.zero_oi is not None:
        w_OI = w_OI - _spread(matrix.zero_oi.astype(jnp.float32), format, w_OI.shape)
    elif format.element_type == "int4":
        w_OI = w_OI - INT4_ZERO
    return (w_OI * _spread(f32_scales(matrix.scale_oi), format, w_OI.shape)).astype(dtype)


def f32_scales(scale: jax.Array) -> jax.Array:
    """Factors as f32; exponents become powers of two, the smallest of them zero."""
    if scale.dtype != jnp.uint8:
        return scale.astype(jnp.float32)
    return lax.bitcast_convert_type(scale.astype(jnp.int32) << _F32_MANTISSA_BITS, jnp.float32)


def float4(code: jax.Array) -> jax.Array:
    """float4_e2m1fn of i32 0 to 15, f32: a sign, two bits of exponent and one of mantissa."""
    size, half = code & 7, 126 << _F32_MANTISSA_BITS
    # Those below 1 are subnormal: 0 and a half.
    bits = jnp.where(size < 2, size * half, (size << (_F32_MANTISSA_BITS - 1)) + half)
    return lax.bitcast_convert_type(bits | (code & 8) << 28, jnp.float32)


def _elements(values: jax.Array, format: QuantizedFormat) -> jax.Array:
    """What is stored, f32[O, I]; of int4 as if the zero point were 0."""
    if format.per_byte == 1:
        return values.astype(jnp.float32)
    code = values.astype(jnp.int32)
    code = jnp.stack([code & 15, code >> 4], axis=-1).reshape(*values.shape[:-1], -1)
    return float4(code) if format.element_type == "mxfp4" else code.astype(jnp.float32)


def _spread(of_block: jax.Array, format: QuantizedFormat, shape: tuple[int, ...]) -> jax.Array:
    """A number of each block as one of each of its numbers."""
    (num_rows, num_columns), (rows, columns) = shape, format.block
    rows_Oi = jnp.repeat(of_block, rows, axis=0)[:num_rows] if rows > 1 else of_block
    return jnp.repeat(rows_Oi, columns, axis=1)[:, :num_columns] if columns else rows_Oi
