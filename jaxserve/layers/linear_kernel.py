"""Calls the kernel for linear modules: a grouped matmul with a single group.

The kernel reads a layer's weights where they are in the stack of all layers, and applies scales tile by tile
(`kernels_pallas.grouped_matmul`). XLA alone would write dequantised weights to memory and read them again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxserve.layers.context import LinearOps
from jaxserve.parallel.mesh import partition_spec
from kernels_pallas.grouped_matmul.api import GroupedMatmul, Matrices
from kernels_pallas.grouped_matmul.xla.quantized_rows import multiply_rows
from kernels_pallas.quantized import QuantizedFormat, quantize_rows
from kernels_pallas.shards import model_size, over_model
from kernels_pallas.token_tiles import Blocks


class StackedMatrix(NamedTuple):
    """A linear module's matrix.

    Attributes:
        matrices: the matrices of all layers.
        layer: i32, the index of the layer among them.
        axes: logical axes of outputs and inputs.
    """

    matrices: Matrices
    layer: jax.Array
    axes: tuple[str | None, str | None]


def multiply(
    ops: LinearOps, x_TI: jax.Array, group: Sequence[StackedMatrix], out_dtype: DTypeLike | None = None
) -> list[jax.Array]:
    """Return `x W^T` for the matrices of modules that read the same activations.

    Args:
        ops: the kernel and the mesh.
        x_TI: activations, replicated on every device, or sharded if the matrices are sharded over their inputs.
        group: matrices of one layer, with the same format and the same sharding of inputs.
        out_dtype: dtype of the results; x's dtype by default.
    """
    format = group[0].matrices.format
    shardings = [partition_spec(each.axes, each.matrices.values_XOI.shape[1:], ops.mesh) for each in group]
    in_axis = shardings[0][1]
    activations = "exact" if format is None else ops.quantizes(x_TI.shape[0])

    def multiply_shard(x_TI: jax.Array, layer: jax.Array, *arrays: Matrices) -> list[jax.Array]:
        matrices = [each._replace(format=format) for each in arrays]
        if format is not None and activations == "xla":
            rows = quantize_rows(x_TI, format)
            results = [multiply_rows(rows, each, layer, out_dtype or x_TI.dtype) for each in matrices]
        else:
            quantized_as = format if activations == "kernel" else None
            results = _multiply_blocks(ops.matmul, x_TI, layer, matrices, quantized_as, out_dtype or x_TI.dtype)
        return results if in_axis is None else [lax.psum(y_TO, in_axis) for y_TO in results]

    specs = [_specs(each.matrices, *sharding) for each, sharding in zip(group, shardings, strict=True)]
    out_specs = [P(None, out_axis) for out_axis, _ in shardings]
    run = over_model(multiply_shard, ops.mesh, (P(None, in_axis), P(), *specs), out_specs)
    # The format is static, and no operand.
    return run(x_TI, group[0].layer, *(each.matrices._replace(format=None) for each in group))


def _multiply_blocks(
    matmul: GroupedMatmul,
    x_TI: jax.Array,
    layer: jax.Array,
    matrices: list[Matrices],
    quantized_as: QuantizedFormat | None,
    out_dtype: DTypeLike,
) -> list[jax.Array]:
    """Return the kernel's products, [T, O] by matrix; activations are quantised first if `quantized_as` is not None."""
    num_tokens, num_inputs = x_TI.shape
    block_rows = matmul.block_rows(num_tokens, 1, num_inputs * x_TI.dtype.itemsize)
    x_PI = jnp.pad(x_TI, ((0, -num_tokens % block_rows), (0, 0)))
    num_blocks = x_PI.shape[0] // block_rows
    blocks = Blocks(jnp.full(num_blocks, layer, jnp.int32), jnp.full(1, num_blocks, jnp.int32))
    rows = x_PI if quantized_as is None else quantize_rows(x_PI, quantized_as)
    return [y_PO[:num_tokens] for y_PO in matmul(rows, matrices, blocks, out_dtype=out_dtype)]


def can_add_bias(ops: LinearOps, matrix: StackedMatrix, num_tokens: int) -> bool:
    """Return whether the kernel multiplies and can add a bias: not to each of several partial sums."""
    if matrix.matrices.format is not None and ops.quantizes(num_tokens) == "xla":
        return False
    in_axis = partition_spec(matrix.axes, matrix.matrices.values_XOI.shape[1:], ops.mesh)[1]
    return ops.matmul.adds_bias and (in_axis is None or model_size(ops.mesh) == 1)


def _specs(matrices: Matrices, out_axis: Any, in_axis: Any) -> Matrices:
    """Return the partition specs of stacked matrices; blocks of whole rows are not split over the inputs."""
    format = matrices.format
    block = P(None, out_axis, in_axis if format is not None and format.block[1] else None)
    specs: Any = (P(None, out_axis, in_axis), *(None if each is None else block for each in matrices[1:3]))
    bias: Any = None if matrices.bias_XO is None else P(None, out_axis)
    return Matrices(*specs, bias_XO=bias)
