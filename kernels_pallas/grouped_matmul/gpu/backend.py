"""Grouped matmul on Hopper GPUs, also of a layer's linear modules, whose matrices all rows share.

Dimension key: S thread blocks that share the inputs, C blocks, P rows of all blocks, m rows of a block, X matrices, I
inputs, i a step of them, O outputs, o the 64 outputs of a warpgroup, B columns of a step, h halves. A column of a 4-bit
matrix is one byte, that is two inputs, and the rows are split into two halves: in each step, the first four elements of
every word of four bytes, and the last four; see `weights.order_of_words`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.grouped_matmul.api import ExpertShape, Matrices, take_rows
from kernels_pallas.grouped_matmul.gpu.kernel import Launch, Operands, Problem, multiply
from kernels_pallas.grouped_matmul.gpu.split_sums import SplitSums, add_up
from kernels_pallas.grouped_matmul.gpu.tile import (
    BLOCK_SCALED,
    MAX_ROWS,
    MIN_ROWS,
    ROW_SCALED,
    SCALE_BLOCK,
    Products,
    choose_tile,
    multiples,
)
from kernels_pallas.grouped_matmul.gpu.weights import Weight, as_words, order_of_words
from kernels_pallas.quantized import QuantizedFormat, QuantizedRows
from kernels_pallas.token_tiles import Blocks, choose_block_rows

# The fewest matrices whose split sums a kernel adds: XLA fuses those of MLA's two latents with what uses them, and adds
# those of q, k and v in a launch each.
_ADDED_TOGETHER = 3


def check_shape(shape: ExpertShape) -> None:
    """Raise NotImplementedError for matrices that the kernel cannot multiply."""
    num_outputs, num_inputs, dtype, format = shape[:4]
    if shape.transposed:
        raise NotImplementedError("the kernel needs matrices of [outputs, inputs]")
    if dtype != jnp.bfloat16:
        raise NotImplementedError(f"matrices in {dtype}: the kernel supports only bfloat16")
    inputs, outputs = multiples(format)
    if num_inputs % inputs or num_outputs % outputs:
        raise NotImplementedError(
            f"matrices of {num_inputs} inputs and {num_outputs} outputs on a device: the kernel needs multiples of "
            f"{inputs} and {outputs}"
        )


class GpuGroupedMatmul:
    """A `GroupedMatmul`.

    Args:
        num_cores: number of SMs of the device.
        interpret: parameters of the GPU interpret mode, or False to compile.
    """

    # cuBLAS has larger tiles, but CUDA graphs cannot capture its calls where they read a layer's matrix in a stack.
    max_dense_rows = MAX_ROWS
    max_compared = 1 << 22
    adds_bias = True

    def __init__(self, num_cores: int, interpret: Any = False) -> None:
        self._num_cores = num_cores
        self._interpret = interpret

    def takes_quantized_rows(self, format: QuantizedFormat, num_inputs: int) -> bool:
        """See `GroupedMatmul`."""
        return num_inputs % SCALE_BLOCK == 0 and format.element_type == "fp8" and format in (BLOCK_SCALED, *ROW_SCALED)

    def block_rows(self, num_rows: int, num_groups: int, row_bytes: int) -> int:
        """See `GroupedMatmul`."""
        del row_bytes
        return choose_block_rows(num_rows, num_groups, min_rows=MIN_ROWS, max_rows=MAX_ROWS)

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
        if transposed:
            raise NotImplementedError("the kernel needs matrices of [outputs, inputs]")
        x_PI = take_rows(x, row_P)
        (num_rows, num_inputs), format = x_PI.shape, matrices[0].format
        x_scale_iP = None
        if isinstance(x_PI, QuantizedRows):
            x_PI, x_scale_iP = x_PI
            assert out_dtype is not None, "quantised rows do not say the dtype of the results"
        halves, num_blocks = 1 if format is None else format.per_byte, blocks.group_C.shape[0]
        outputs = [each.values_XOI.shape[1] for each in matrices]
        out_dtype = jnp.dtype(out_dtype or x_PI.dtype)
        block_rows = num_rows // num_blocks
        quantized = x_scale_iP is not None
        products = Products(block_rows, num_blocks, outputs, num_inputs, format, out_dtype.itemsize, quantized)
        tile = choose_tile(products, self._num_cores)
        num_steps = num_inputs // (tile.columns * halves * tile.splits)
        problem = Problem(tile, format, num_steps, quantized_rows=quantized)
        in_f32 = tile.splits > 1 or out_dtype == jnp.float32
        shapes = [(tile.splits, sum(outputs), num_rows)] if in_f32 else [(num_rows, size) for size in outputs]
        kernel_dtype = jnp.float32 if in_f32 else out_dtype
        # The last axis runs fastest. Few rows have about one block per matrix, and the blocks that are not used should
        # come last; the blocks of many rows share matrices, which they should read at the same time.
        grid = {"block": num_blocks, "outputs": sum(outputs) // tile.outputs, "split": tile.splits}
        if tile.rows == MAX_ROWS:
            grid = {"outputs": grid["outputs"], "block": num_blocks, "split": tile.splits}
        launch = Launch("grouped_matmul", grid, shapes, kernel_dtype, self._interpret)
        x_hPB = x_PI[None] if halves == 1 else order_of_words(x_PI, tile.columns)
        operands = Operands(blocks, x_hPB, [_weight(each, bias=not in_f32) for each in matrices], x_scale_iP)
        results = multiply(operands, problem, launch)
        if not in_f32:
            return results
        if len(matrices) >= _ADDED_TOGETHER and tile.splits > 1 and out_dtype != jnp.float32:
            split = SplitSums(results[0], [each.bias_XO for each in matrices], blocks)
            return add_up(split, outputs, out_dtype, self._interpret)
        return _add_up(results[0], matrices, blocks, out_dtype)


def _add_up(sums_SOP: jax.Array, matrices: Sequence[Matrices], blocks: Blocks, out_dtype: jnp.dtype) -> list[jax.Array]:
    """Add up the sums of all splits, and the biases; return the results of each matrix."""
    results: list[jax.Array] = []
    for each in matrices:
        first, number = sum(result.shape[1] for result in results), each.values_XOI.shape[1]
        y_PO = jnp.sum(sums_SOP[:, first : first + number], axis=0).T
        if each.bias_XO is not None:
            bias_CO = each.bias_XO[blocks.group_C].astype(jnp.float32)
            y_PO += jnp.repeat(bias_CO, y_PO.shape[0] // bias_CO.shape[0], axis=0)
        results.append(y_PO.astype(out_dtype))
    return results


def _weight(matrices: Matrices, *, bias: bool) -> Weight:
    scale = matrices.scale_Xoi
    if matrices.format in ROW_SCALED and scale is not None:
        scale = scale[:, :, 0]
    values = matrices.values_XOI
    if matrices.format is not None and matrices.format.per_byte > 1:
        values = as_words(values)
    return Weight(values, scale, matrices.zero_Xoi, matrices.bias_XO if bias else None)
