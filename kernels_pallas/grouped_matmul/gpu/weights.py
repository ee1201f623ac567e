"""Left operands of the grouped matmul on Hopper GPUs: the steps of a matrix, converted to bf16 if it is quantised.

A warpgroup converts its own 64 outputs. The scales of a step are loaded during the step before, since a load from
global memory takes longer than a step.

Dimension key: as in `gpu/backend.py`; B columns per step of a 4-bit matrix, W words of them, e elements of
half of a word, p columns of a piece.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.gpu.tile import BLOCK_SCALED, ROW_SCALED, SCALE_BLOCK, Tile
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.quantized import INT4_ZERO, QuantizedFormat, f32_scales
from kernels_pallas.warpgroup import MATRIX, ROWS, WARPGROUP_ROWS

# Register layout for loading bytes that are converted to 16-bit operands of a product.
_BYTES = plgpu.Layout.WGMMA_UPCAST_2X
# An f32 whose last mantissa bit is worth 1: setting its low bits to a small integer adds that integer.
_F32_BIAS = 2.0**23
_ABOVE_BITS = 0x4B000000
# The bias of float16's exponent is 15, that of float4's is 1.
_FLOAT4_UNIT = 2.0**14

# Bytes of a 4-bit matrix are read as words, and a tile of registers has this many.
WORD_BYTES = 4
_TILE_WORDS = 8

# Values of a step that are loaded ahead: arrays in registers.
Ahead: TypeAlias = tuple[jax.Array, ...]


class Weight(NamedTuple):
    """One matrix in global memory.

    Attributes:
        w: [O, I] of all groups, or, transposed, [I, O]; 4-bit elements as i32 words, [O, I / 8].
        scale: scales of quantised matrices, [X, o, i] or, with one per row, [X, O]; else None.
        zero: zero points of 4-bit matrices that have them, [X, o, i]; else None.
        bias: added to the sums, [X, O]; else None.
    """

    w: Any
    scale: Any = None
    zero: Any = None
    bias: Any = None


class Place(NamedTuple):
    """The part of the matrices that a warpgroup multiplies.

    Attributes:
        weight: the matrices.
        group: index of the matrix.
        output: the first of the 64 outputs.
        first_step: the first step, which is not 0 if thread blocks share the inputs.
    """

    weight: Weight
    group: jax.Array
    output: jax.Array
    first_step: jax.Array


class Converter(Protocol):
    """Makes operands of wgmma products, bf16[64, i], from the steps of a quantised matrix."""

    def load(self, place: Place, step: jax.Array) -> Ahead:
        """Load what the conversion of a step needs besides the matrix."""
        ...

    def convert(self, w_oB: Any, ahead: Ahead, out: Any) -> None:
        """Convert a step's columns in shared memory.

        Args:
            w_oB: the 64 outputs of the step.
            ahead: result of `load`.
            out: bf16[h, 64, B], where to write.
        """
        ...

    def scale(self, ahead: Ahead, part_om: jax.Array) -> jax.Array:
        """Return the product of a step, scaled; only for `BLOCK_SCALED`."""
        ...

    def finish(self, place: Place, sum_om: jax.Array) -> jax.Array:
        """Return the sum of all steps, scaled if there is a scale per row."""
        ...


def order_of_words(x_PI: jax.Array, columns: int) -> jax.Array:
    """Put inputs in the order in which 4-bit matrices are converted, [h, P, I / 2].

    A step has `columns` bytes. Its first half has the first element of every word, then the second of every word, up to
    the fourth; the second half has the others.
    """
    num_rows, words = x_PI.shape[0], columns // WORD_BYTES
    x_PiWe = x_PI.reshape(num_rows, -1, words, 2 * WORD_BYTES)
    # XLA fuses slices with what computes the rows, and a transposition it does not.
    parts = [x_PiWe[..., element] for element in range(2 * WORD_BYTES)]
    halves = (jnp.stack(half, axis=2) for half in (parts[:WORD_BYTES], parts[WORD_BYTES:]))
    return jnp.stack([half.reshape(num_rows, -1) for half in halves])


def as_words(w_XOB: jax.Array) -> jax.Array:
    """Return bytes as i32 words, [X, O, W]; nothing is copied."""
    return lax.bitcast_convert_type(w_XOB.reshape(*w_XOB.shape[:2], -1, WORD_BYTES), jnp.int32)


def choose_converter(format: QuantizedFormat, tile: Tile) -> Converter:
    """Return the converter for a format."""
    if format == BLOCK_SCALED:
        return _ScaledBlocks(tile.piece)
    if format in ROW_SCALED:
        return _ScaledRows(tile.piece)
    return _ScaledGroups(tile, format)


class _ScaledRows:
    """8-bit matrices with a scale per row: the sum of all steps is scaled."""

    def __init__(self, piece: int) -> None:
        self._piece = piece

    def load(self, place: Place, step: jax.Array) -> Ahead:
        """See `Converter`."""
        del place, step
        return ()

    def convert(self, w_oB: Any, ahead: Ahead, out: Any) -> None:
        """See `Converter`."""
        del ahead
        for start in range(0, w_oB.shape[1], self._piece):
            columns = slice(start, start + self._piece)
            w_op = plgpu.load(w_oB.at[:, columns], layout=_BYTES, optimized=False)
            if jnp.issubdtype(w_op.dtype, jnp.floating):
                # Hopper cannot convert fp8 to bf16 in one instruction; both conversions are exact.
                w_op = w_op.astype(jnp.float32)
            out.at[0, :, columns][...] = plgpu.layout_cast(w_op.astype(out.dtype), MATRIX)

    def scale(self, ahead: Ahead, part_om: jax.Array) -> jax.Array:
        """See `Converter`."""
        del ahead
        return part_om

    def finish(self, place: Place, sum_om: jax.Array) -> jax.Array:
        """See `Converter`."""
        outputs = pl.ds(place.output, WARPGROUP_ROWS)
        scale_o = plgpu.load(place.weight.scale.at[place.group, outputs], layout=ROWS, optimized=False)
        return sum_om * lax.broadcast_in_dim(f32_scales(scale_o), sum_om.shape, [0])


class _ScaledBlocks(_ScaledRows):
    """FP8 matrices with a scale per 128 x 128 elements: the product of each step, of 128 inputs, is scaled."""

    def load(self, place: Place, step: jax.Array) -> Ahead:
        """See `Converter`."""
        return (place.weight.scale[place.group, lax.div(place.output, SCALE_BLOCK), step],)

    def scale(self, ahead: Ahead, part_om: jax.Array) -> jax.Array:
        """See `Converter`."""
        return part_om * plgpu.layout_cast(lax.broadcast_in_dim(ahead[0], part_om.shape, ()), MATRIX)

    def finish(self, place: Place, sum_om: jax.Array) -> jax.Array:
        """See `Converter`."""
        del place
        return sum_om


class _ScaledGroups:
    """4-bit matrices with a scale per group of a row: dequantised before they are multiplied."""

    def __init__(self, tile: Tile, format: QuantizedFormat) -> None:
        self._format, self._piece, self._columns = format, tile.piece, tile.columns
        self._columns_of_scale = format.block[1] // format.per_byte

    def load(self, place: Place, step: jax.Array) -> Ahead:
        """See `Converter`; the scales of each piece, then its zero points."""
        of_blocks = [values for values in (place.weight.scale, place.weight.zero) if values is not None]
        rows = pl.ds(place.output, WARPGROUP_ROWS)
        arrays: list[jax.Array] = []
        for start in range(0, self._columns, self._piece):
            column = step * self._columns + start
            at = 0 if self._columns_of_scale == 0 else lax.div(column, self._columns_of_scale)
            arrays += [plgpu.load(each.at[place.group, rows, at], layout=ROWS, optimized=False) for each in of_blocks]
        return tuple(arrays)

    def convert(self, w_oB: Any, ahead: Ahead, out: Any) -> None:
        """See `Converter`; elements are in the order of `order_of_words`."""
        word_oW = plgpu.load(w_oB, layout=MATRIX, optimized=False)
        stride = len(ahead) // (self._columns // self._piece)
        scales, zeros = [f32_scales(scale_o) for scale_o in ahead[::stride]], ahead[1::stride] if stride > 1 else ()
        if self._format.element_type == "mxfp4":
            # Powers of two, and the elements, are exact in bf16, of which one instruction multiplies two.
            scale_oW = self._spread([(scale_o * _FLOAT4_UNIT).astype(out.dtype) for scale_o in scales])
            elements = [element_oW.astype(out.dtype) for element_oW in _small_float4(word_oW)]
        else:
            scale_oW, zero_oW = self._spread(scales), _F32_BIAS + INT4_ZERO
            if zeros:
                zero_oW = self._spread([_biased_f32(zero_o.astype(jnp.int32)) for zero_o in zeros])
            elements = [_biased_f32((word_oW >> shift) & 15) - zero_oW for shift in range(0, 32, 4)]
        parts = [(element_oW * scale_oW).astype(out.dtype) for element_oW in elements]
        for half in range(2):
            out.at[half][...] = jnp.concatenate(parts[half * WORD_BYTES : (half + 1) * WORD_BYTES], axis=1)

    def _spread(self, by_piece: Sequence[jax.Array]) -> jax.Array:
        """Broadcast the values of each piece, [64], over its words, and put the pieces side by side."""
        words = self._piece // WORD_BYTES
        spread = partial(
            lax.broadcast_in_dim, shape=(WARPGROUP_ROWS, max(words, _TILE_WORDS)), broadcast_dimensions=[0]
        )
        if words >= _TILE_WORDS:
            return jnp.concatenate([spread(values_o) for values_o in by_piece], axis=1)
        column = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS, _TILE_WORDS), 1, layout=MATRIX)
        pairs = zip(by_piece[::2], by_piece[1::2], strict=True)
        tiles = [jnp.where(column < words, spread(left_o), spread(right_o)) for left_o, right_o in pairs]
        return jnp.concatenate(tiles, axis=1)

    def scale(self, ahead: Ahead, part_om: jax.Array) -> jax.Array:
        """See `Converter`."""
        del ahead
        return part_om

    def finish(self, place: Place, sum_om: jax.Array) -> jax.Array:
        """See `Converter`."""
        del place
        return sum_om


def _small_float4(word: jax.Array) -> list[jax.Array]:
    """Return the eight float4_e2m1fn of each word in f32, divided by `_FLOAT4_UNIT`.

    The bits of the exponent and the mantissa become the lowest of a float16's exponent and the first of its mantissa:
    0.5, the only subnormal, becomes one. An element of each half of the word is decoded at the same time.
    """
    lower: list[jax.Array] = []
    upper: list[jax.Array] = []
    for shift in range(0, 16, 4):
        both = _shifted(word, 9 - shift) & 0x0E000E00 | _shifted(word, 12 - shift) & (0x80008000 - (1 << 32))
        for half, bits in ((lower, both), (upper, both >> 16)):
            half.append(lax.bitcast_convert_type(bits.astype(jnp.int16), jnp.float16).astype(jnp.float32))
    return [*lower, *upper]


def _shifted(word: jax.Array, left: int) -> jax.Array:
    return word << left if left >= 0 else word >> -left


def _biased_f32(integer: jax.Array) -> jax.Array:
    """Return a small i32 plus `_F32_BIAS` as f32, in a quarter of the time that a conversion takes."""
    return lax.bitcast_convert_type(integer | _ABOVE_BITS, jnp.float32)
