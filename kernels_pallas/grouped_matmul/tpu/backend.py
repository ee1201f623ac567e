"""Grouped matmul on TPU: a kernel over blocks of rows, which fetches each block's matrix.

A block's rows stay in VMEM while its matrix is streamed, so a matrix is fetched, and dequantised if it is quantised,
once per block. If groups are large enough, a block therefore has as many rows as fit.

A device of two cores splits the outputs, or the blocks where these have too few outputs.

Dimension key: T tokens, C blocks, P rows of all blocks, W rows of a block, X matrices, I inputs, O outputs, o a block
of them, i blocks of inputs with a scale.
"""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.grouped_matmul.api import ExpertShape, Matrices, take_rows
from kernels_pallas.grouped_matmul.tpu.launch import Launch, multiply
from kernels_pallas.grouped_matmul.tpu.problem import LANES, make_problem
from kernels_pallas.grouped_matmul.tpu.taken_rows import can_take
from kernels_pallas.quantized import ElementType, QuantizedFormat, QuantizedRows
from kernels_pallas.token_tiles import Blocks, choose_block_rows

# A tile of bf16 has 16 rows. With the maximum, each byte of a matrix is used often enough to hide its transfer.
_MIN_ROWS = 16
_MAX_ROWS = 512
# Bytes of a block of rows, which is double-buffered.
_ROWS_BYTES = 8 << 20


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
    if shape.format.block != (LANES, LANES) or shape.num_outputs % LANES or shape.num_inputs % LANES:
        raise NotImplementedError(
            f"matrices of {shape.num_inputs} inputs and {shape.num_outputs} outputs on a device, quantised in blocks "
            f"of {shape.format.block}: the kernel needs multiples of {LANES}, and blocks of that"
        )


class TpuGroupedMatmul:
    """A `GroupedMatmul`.

    Args:
        num_cores: TensorCores of a device.
        elements: 8-bit elements that the MXU multiplies faster than bf16.
        interpret: parameters of the TPU interpret mode, or False to compile.
    """

    max_dense_rows = 0
    max_compared = 1 << 22
    adds_bias = False

    def __init__(self, num_cores: int = 1, elements: Collection[ElementType] = (), interpret: Any = False) -> None:
        self._num_cores = num_cores
        self._elements = elements
        self._interpret = interpret

    def takes_quantized_rows(self, format: QuantizedFormat, num_inputs: int) -> bool:
        """See `GroupedMatmul`."""
        in_blocks = format == QuantizedFormat("fp8", (LANES, LANES)) and num_inputs % LANES == 0
        return format.element_type in self._elements and (in_blocks or format.block == (1, 0))

    def block_rows(self, num_rows: int, num_groups: int, row_bytes: int) -> int:
        """See `GroupedMatmul`."""
        max_rows = min(_MAX_ROWS, 1 << (_ROWS_BYTES // row_bytes).bit_length() - 1)
        return choose_block_rows(num_rows, num_groups, min_rows=_MIN_ROWS, max_rows=max(_MIN_ROWS, max_rows))

    def __call__(
        self,
        x: jax.Array | QuantizedRows,
        matrices: Sequence[Matrices],
        blocks: Blocks,
        *,
        row_P: jax.Array | None = None,
        transposed: bool = False,
        out_dtype: DTypeLike | None = None,
    ) -> list[jax.Array]:
        """See `GroupedMatmul`."""
        num_rows = x.shape[0] if row_P is None else row_P.shape[0]
        block_rows = num_rows // blocks.group_C.shape[0]
        # XLA copies larger blocks faster, and they have less padding.
        if isinstance(x, QuantizedRows) or block_rows > _MIN_ROWS or not can_take(x):
            x, row_P = take_rows(x, row_P), None
        if out_dtype is None:
            assert not isinstance(x, QuantizedRows), "quantised rows do not say the dtype of the results"
            out_dtype = x.dtype
        launch = Launch(blocks, row_P, block_rows, jnp.dtype(out_dtype), self._num_cores, self._interpret)
        out_axis = 2 if transposed else 1
        return [
            multiply(make_problem(x, each, transposed=transposed), launch, each.values_XOI.shape[out_axis])
            for each in matrices
        ]
