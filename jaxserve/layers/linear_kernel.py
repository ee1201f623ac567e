"""Calls the kernel for quantised linear modules: a grouped matmul with a single group.

The kernel applies the scales tile by tile (`kernels_pallas.grouped_matmul`). XLA alone would write the dequantised
weights to memory and read them again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxserve.layers.context import LinearOps
from jaxserve.parallel.mesh import partition_spec
from kernels_pallas.grouped_matmul.api import Matrices
from kernels_pallas.shards import over_model
from kernels_pallas.token_tiles import Blocks


def multiply(
    ops: LinearOps, x_TI: jax.Array, matrices: Matrices, layer: jax.Array, axes: tuple[str | None, str | None]
) -> jax.Array:
    """Return `x W^T` for one layer's matrix.

    Args:
        ops: the kernel and the mesh.
        x_TI: activations, replicated on every device, or sharded if the matrix is sharded over its inputs.
        matrices: the matrices of all layers.
        layer: i32, the index of the layer among them.
        axes: logical axes of outputs and inputs.
    """
    out_axis, in_axis = partition_spec(axes, matrices.values_XOI.shape[1:], ops.mesh)
    format = matrices.format
    assert format is not None
    block_spec = P(None, out_axis, in_axis if format.block[1] else None)

    def multiply_shard(x_TI: jax.Array, matrices: Matrices, layer: jax.Array) -> jax.Array:
        num_tokens, num_inputs = x_TI.shape
        block_rows = ops.matmul.block_rows(num_tokens, 1, num_inputs * x_TI.dtype.itemsize)
        x_PI = jnp.pad(x_TI, ((0, -num_tokens % block_rows), (0, 0)))
        num_blocks = x_PI.shape[0] // block_rows
        group = Blocks(jnp.full(num_blocks, layer, jnp.int32), jnp.full(1, num_blocks, jnp.int32))
        y_TO = ops.matmul(x_PI, matrices._replace(format=format), group)[:num_tokens]
        return y_TO if in_axis is None else lax.psum(y_TO, in_axis)

    specs: Any = (P(None, out_axis, in_axis), block_spec, None if matrices.zero_Xoi is None else block_spec)
    specs = (P(None, in_axis), Matrices(*specs), P())
    run = over_model(multiply_shard, ops.mesh, specs, P(None, out_axis))
    return run(x_TI, matrices._replace(format=None), layer)
