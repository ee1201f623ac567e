"""Grouped matmul on TPU: a kernel over blocks of rows, which fetches each block's matrix.

A block's rows stay in VMEM while its matrix is streamed, so a matrix is fetched, and dequantised if it is quantised,
once per block. If groups are large enough, a block therefore has as many rows as fit.

Dimension key: C blocks, P rows of all blocks, W rows of a block, X matrices, I inputs, O outputs, o a block of them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from kernels_pallas.grouped_matmul.api import ExpertShape, Matrices
from kernels_pallas.mxu import mxu_dot
from kernels_pallas.pallas import pl, pltpu
from kernels_pallas.quantized import INT4_ZERO, QuantizedFormat, QuantizedRows, f32_scales, float4
from kernels_pallas.token_tiles import Blocks, choose_block_rows

_LANES = 128
# A tile of bf16 has 16 rows. With the maximum, each byte of a matrix is used often enough to hide its transfer.
_MIN_ROWS = 16
_MAX_ROWS = 512
# Bytes of a block of rows, which is double-buffered.
_ROWS_BYTES = 8 << 20
# Bytes of a block of a matrix; blocks of matrices, rows and results are all double-buffered.
_BLOCK_BYTES = 4 << 20
# Bytes of temporaries per byte of a quantised matrix: f32 and i32, twice.
_GROUPED_WORK = 16
# Bytes of sums and of f32 operands split into parts: more than all blocks if these are f32.
_SPARE_BYTES = 16 << 20


def check_shape(shape: ExpertShape) -> None:
    """Raise NotImplementedError for matrices that the kernel cannot multiply."""
    if shape.rows_dtype == jnp.float16:
        raise NotImplementedError("the TPU kernel does not support float16, which the MXU lacks")
    if shape.format is None:
        return
    rows, columns = shape.format.block
    if rows == 1:
        if (columns or shape.num_inputs) % shape.format.per_byte:
            raise NotImplementedError(
                f"quantisation blocks of {columns} elements: the kernel needs a whole number of bytes"
            )
        return
    if shape.format.element_type != "fp8":
        raise NotImplementedError(
            f"{shape.format.element_type} matrices in blocks of {rows} rows: the kernel supports only fp8"
        )
    if shape.format.block != (_LANES, _LANES) or shape.num_outputs % _LANES or shape.num_inputs % _LANES:
        raise NotImplementedError(
            f"matrices of {shape.num_inputs} inputs and {shape.num_outputs} outputs on a device, quantised in blocks "
            f"of {shape.format.block}: the kernel needs multiples of {_LANES}, and blocks of that"
        )


class TpuGroupedMatmul:
    """A `GroupedMatmul`.

    Args:
        interpret: parameters of the TPU interpret mode, or False to compile.
    """

    max_dense_rows = 0
    max_compared = 1 << 22
    adds_bias = False

    def __init__(self, interpret: Any = False) -> None:
        self._interpret = interpret

    def takes_quantized_rows(self, format: QuantizedFormat, num_inputs: int) -> bool:
        """See `GroupedMatmul`."""
        del format, num_inputs
        return False

    def block_rows(self, num_rows: int, num_groups: int, row_bytes: int) -> int:
        """See `GroupedMatmul`."""
        max_rows = min(_MAX_ROWS, 1 << (_ROWS_BYTES // row_bytes).bit_length() - 1)
        return choose_block_rows(num_rows, num_groups, min_rows=_MIN_ROWS, max_rows=max(_MIN_ROWS, max_rows))

    def __call__(
        self,
        x_PI: jax.Array | QuantizedRows,
        matrices: Sequence[Matrices],
        blocks: Blocks,
        *,
        transposed: bool = False,
        out_dtype: DTypeLike | None = None,
    ) -> list[jax.Array]:
        """See `GroupedMatmul`."""
        if isinstance(x_PI, QuantizedRows):
            raise NotImplementedError("the kernel does not multiply rows that are quantised")
        out_dtype = jnp.dtype(out_dtype or x_PI.dtype)
        return [self._multiply(x_PI, each, blocks, transposed, out_dtype) for each in matrices]

    def _multiply(
        self, x_PI: jax.Array, matrices: Matrices, blocks: Blocks, transposed: bool, out_dtype: jnp.dtype
    ) -> jax.Array:
        problem = _transposed_problem(x_PI, matrices.values_XOI) if transposed else _problem(x_PI, matrices)
        row_axis, out_axis = (1, 2) if transposed else (2, 1)
        (num_block_rows, _), num_outputs = x_PI.shape, matrices.values_XOI.shape[out_axis]
        block_rows = num_block_rows // blocks.group_C.shape[0]
        row_bytes = matrices.values_XOI.shape[row_axis] * matrices.values_XOI.dtype.itemsize * problem.work
        block_outputs = _block_outputs(num_outputs, row_bytes)
        rows = [pl.BlockSpec((block_rows, x.shape[1]), lambda c, o, _: (c, 0)) for x in problem.rows]
        of_matrices = [
            pl.BlockSpec((1, block_outputs, each.shape[2]), lambda c, o, group_C: (group_C[c], o, 0))
            for each in problem.by_output
        ]
        of_matrices += [
            pl.BlockSpec((1, each.shape[1], block_outputs), lambda c, o, group_C: (group_C[c], 0, o))
            for each in problem.by_input
        ]
        whole = [pl.BlockSpec(each.shape, lambda c, o, _: (0, 0)) for each in problem.constants]
        scalars = [
            pl.BlockSpec((1, *each.shape[1:]), lambda c, o, group_C: (group_C[c], 0, 0), memory_space=pltpu.SMEM)
            for each in problem.scalars
        ]
        # XLA would copy stacks that it finds small enough into VMEM in every step, those of other layers included.
        in_hbm = partial(pltpu.with_memory_space_constraint, memory_space=pltpu.HBM)
        stacks = map(in_hbm, (*problem.by_output, *problem.by_input))
        operands = (*problem.rows, *stacks, *problem.constants, *map(in_hbm, problem.scalars))
        block_bytes = sum(block_rows * x.shape[1] * x.dtype.itemsize for x in problem.rows)
        block_bytes += sum(block_outputs * each.shape[2] * each.dtype.itemsize for each in problem.by_output)
        block_bytes += sum(block_outputs * each.shape[1] * each.dtype.itemsize for each in problem.by_input)
        block_bytes += block_rows * block_outputs * out_dtype.itemsize
        return pl.pallas_call(
            problem.kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                # A device may have no valid block.
                grid=(jnp.maximum(blocks.num_live, 1), pl.cdiv(num_outputs, block_outputs)),
                in_specs=[*rows, *of_matrices, *whole, *scalars],
                out_specs=pl.BlockSpec((block_rows, block_outputs), lambda c, o, _: (c, o)),
            ),
            out_shape=jax.ShapeDtypeStruct((num_block_rows, num_outputs), out_dtype),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=2 * block_bytes + _SPARE_BYTES
            ),
            interpret=self._interpret,
            name="grouped_matmul",
        )(blocks.group_C, *operands)


class _Problem(NamedTuple):
    """A kernel and its operands, in the order of its arguments.

    Attributes:
        kernel: body of the kernel.
        rows: rows to multiply, [P, ...].
        by_output: arrays with an entry per output of a matrix, [X, O, ...].
        by_input: arrays with an entry per input of a matrix, [X, I, O].
        constants: arrays that all steps share.
        scalars: scalars of each matrix, [X, ...].
        work: bytes that a step needs per byte of a matrix's block.
    """

    kernel: Callable[..., None]
    rows: tuple[jax.Array, ...]
    by_output: tuple[jax.Array, ...]
    by_input: tuple[jax.Array, ...] = ()
    constants: tuple[jax.Array, ...] = ()
    scalars: tuple[jax.Array, ...] = ()
    work: int = 1


def _problem(x_PI: jax.Array, matrices: Matrices) -> _Problem:
    w_XOI, scale_Xoi, zero_Xoi, format, _ = matrices
    if format is None or scale_Xoi is None:
        return _Problem(_multiply_block, (x_PI,), (w_XOI,))
    if format.block[0] > 1:
        # One column of scales, which would be padded to 128, is passed as a row.
        single = scale_Xoi.shape[2] == 1
        kernel = partial(_multiply_scaled_block, transposed=single)
        return _Problem(kernel, (x_PI,), (w_XOI,), scalars=(scale_Xoi.swapaxes(1, 2) if single else scale_Xoi,))
    # Rows are split instead of bytes: the inputs of the lower halves of the bytes, then those of the upper halves.
    rows = tuple(x_PI[:, part :: format.per_byte] for part in range(format.per_byte))
    by_output = (w_XOI, scale_Xoi, *(() if zero_Xoi is None else (zero_Xoi,)))
    num_bytes, num_groups = w_XOI.shape[2], scale_Xoi.shape[2]
    group_bytes = (format.block[1] or num_bytes * format.per_byte) // format.per_byte
    # A product with this matrix expands values per group to values per byte: alternatives across lanes are slower.
    group_1B = lax.broadcasted_iota(jnp.int32, (1, num_bytes), 1) // group_bytes
    spread_gB = (lax.broadcasted_iota(jnp.int32, (num_groups, 1), 0) == group_1B).astype(jnp.float32)
    kernel = partial(_multiply_grouped_block, format=format, zeros=zero_Xoi is not None)
    return _Problem(kernel, rows, by_output, constants=(spread_gB,), work=_GROUPED_WORK)


def _transposed_problem(x_PI: jax.Array, w_XIO: jax.Array) -> _Problem:
    return _Problem(_multiply_transposed_block, (x_PI,), (), by_input=(w_XIO,))


def _multiply_transposed_block(_: Any, x_WI: Any, w_1Io: Any, out_Wo: Any) -> None:
    out_Wo[...] = mxu_dot(x_WI[...], w_1Io[0], contract=0).astype(out_Wo.dtype)


def _multiply_block(_: Any, x_WI: Any, w_1oI: Any, out_Wo: Any) -> None:
    out_Wo[...] = mxu_dot(x_WI[...], w_1oI[0], contract=1).astype(out_Wo.dtype)


def _multiply_scaled_block(_: Any, x_WI: Any, w_1oI: Any, scale_1oi: Any, out_Wo: Any, *, transposed: bool) -> None:
    """Like `_multiply_block`, one block of columns at a time: the products are scaled instead of the matrix."""
    num_rows = out_Wo.shape[1] // _LANES
    first_row, last_row = pl.program_id(1) * num_rows, scale_1oi.shape[2 if transposed else 1] - 1

    def multiply(column: jax.Array, sum_Wo: jax.Array) -> jax.Array:
        columns = pl.ds(pl.multiple_of(column * _LANES, _LANES), _LANES)
        part_Wo = mxu_dot(x_WI[:, columns], w_1oI[0, :, columns].astype(x_WI.dtype), contract=1)
        # The last block of outputs may be partial.
        places = [(jnp.minimum(first_row + row, last_row), column) for row in range(num_rows)]
        scales = [scale_1oi[0, *(place[::-1] if transposed else place)] for place in places]
        scale_1o = jnp.concatenate([jnp.full((1, _LANES), scale, jnp.float32) for scale in scales], axis=1)
        return sum_Wo + part_Wo * scale_1o

    num_columns = x_WI.shape[1] // _LANES
    out_Wo[...] = lax.fori_loop(0, num_columns, multiply, jnp.zeros(out_Wo.shape, jnp.float32)).astype(out_Wo.dtype)


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


def _block_outputs(num_outputs: int, row_bytes: int) -> int:
    return min(num_outputs, max(_LANES, _BLOCK_BYTES // row_bytes // _LANES * _LANES))
