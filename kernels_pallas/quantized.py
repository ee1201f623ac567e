"""Block-quantised matrices, with one scale per block, and their dequantisation.

4-bit elements are packed two per byte, the first in the lower half: a row of I elements takes I / 2 bytes.

Dimension key: O outputs, I inputs, o blocks of outputs, i blocks of inputs.
"""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

ElementType: TypeAlias = Literal["fp8", "int8", "int4", "mxfp4"]

EIGHT_BIT: tuple[ElementType, ...] = ("fp8", "int8")
# The zero point of int4 matrices that store no zero points.
INT4_ZERO = 8.0
_F32_MANTISSA_BITS = 23


class QuantizedFormat(NamedTuple):
    """The quantisation format of a matrix.

    Attributes:
        element_type: `fp8` is float8_e4m3fn, `int4` an unsigned 4-bit integer with a zero point, and `mxfp4`
            float4_e2m1fn (OCP Microscaling Formats, 1.0).
        block: number of rows and columns that share a scale; 0 columns means a whole row. The last blocks may be
            smaller.
    """

    element_type: ElementType
    block: tuple[int, int]

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the stored weights."""
        return jnp.dtype({"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}.get(self.element_type, jnp.uint8))

    @property
    def per_byte(self) -> int:
        """Elements per byte."""
        return 2 if self.element_type in ("int4", "mxfp4") else 1


class QuantizedMatrix(NamedTuple):
    """One quantised matrix, or several along leading axes.

    Attributes:
        values: the elements, [O, I], or [O, I / 2] bytes of packed 4-bit elements.
        scale_oi: the scale of each block: floating point, or a u8 exponent of two with bias 127 (e8m0).
        zero_oi: u8 zero point of each block of an int4 matrix, or None.
    """

    values: jax.Array
    scale_oi: jax.Array
    zero_oi: jax.Array | None = None


class QuantizedRows(NamedTuple):
    """Activations whose elements are those of the matrices that they are multiplied by.

    Attributes:
        values_TI: the elements, fp8 or int8.
        scale_iT: f32, the scale of each block of inputs of each row; there is one block, or one of every 128 inputs.
    """

    values_TI: jax.Array
    scale_iT: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the elements."""
        return self.values_TI.shape

    def take(self, row_P: jax.Array) -> "QuantizedRows":
        """Return some rows."""
        return QuantizedRows(self.values_TI[row_P], self.scale_iT[:, row_P])


def quantize_rows(x_TI: jax.Array, format: QuantizedFormat) -> QuantizedRows:
    """Quantise activations to the element type of matrices, with a scale per row and as many inputs as theirs have.

    Args:
        x_TI: activations.
        format: format of 8-bit matrices.
    """
    num_rows, num_inputs = x_TI.shape
    columns = format.block[1] or num_inputs
    x_TiB = x_TI.astype(jnp.float32).reshape(num_rows, -1, columns)
    largest = float(jnp.finfo(format.dtype).max) if format.element_type == "fp8" else 127.0
    scale_Ti1 = jnp.max(jnp.abs(x_TiB), axis=2, keepdims=True) / largest
    # A block of zeros has no scale.
    scale_Ti1 = jnp.where(scale_Ti1 == 0, 1.0, scale_Ti1)
    scaled_TI = (x_TiB / scale_Ti1).reshape(x_TI.shape)
    values_TI = jnp.round(scaled_TI) if format.element_type == "int8" else scaled_TI
    return QuantizedRows(values_TI.astype(format.dtype), scale_Ti1[:, :, 0].T)


def dequantize(matrix: QuantizedMatrix, format: QuantizedFormat, dtype: DTypeLike) -> jax.Array:
    """Return `(element - zero point) * scale` in `dtype`, [O, I]; products are in f32."""
    w_OI = _elements(matrix.values, format)
    if matrix.zero_oi is not None:
        w_OI = w_OI - _expand_blocks(matrix.zero_oi.astype(jnp.float32), format, w_OI.shape)
    elif format.element_type == "int4":
        w_OI = w_OI - INT4_ZERO
    return (w_OI * _expand_blocks(f32_scales(matrix.scale_oi), format, w_OI.shape)).astype(dtype)


def f32_scales(scale: jax.Array) -> jax.Array:
    """Return scales in f32; u8 exponents become powers of two, except that exponent 0 becomes 0."""
    if scale.dtype != jnp.uint8:
        return scale.astype(jnp.float32)
    return lax.bitcast_convert_type(scale.astype(jnp.int32) << _F32_MANTISSA_BITS, jnp.float32)


def float4(code: jax.Array) -> jax.Array:
    """Decode float4_e2m1fn from i32 codes 0 to 15 to f32: a sign bit, two exponent bits and a mantissa bit."""
    size, half = code & 7, 126 << _F32_MANTISSA_BITS
    # Magnitudes below 1 are subnormal: 0 and 0.5.
    bits = jnp.where(size < 2, size * half, (size << (_F32_MANTISSA_BITS - 1)) + half)
    return lax.bitcast_convert_type(bits | (code & 8) << 28, jnp.float32)


def _elements(values: jax.Array, format: QuantizedFormat) -> jax.Array:
    """Unpack the stored elements to f32[O, I], before zero points and scales are applied."""
    if format.per_byte == 1:
        return values.astype(jnp.float32)
    code = values.astype(jnp.int32)
    code = jnp.stack([code & 15, code >> 4], axis=-1).reshape(*values.shape[:-1], -1)
    return float4(code) if format.element_type == "mxfp4" else code.astype(jnp.float32)


def _expand_blocks(block_values: jax.Array, format: QuantizedFormat, shape: tuple[int, ...]) -> jax.Array:
    """Repeat the value of each block for all elements of the block."""
    (num_rows, num_columns), (rows, columns) = shape, format.block
    rows_Oi = jnp.repeat(block_values, rows, axis=0)[:num_rows] if rows > 1 else block_values
    return jnp.repeat(rows_Oi, columns, axis=1)[:, :num_columns] if columns else rows_Oi
