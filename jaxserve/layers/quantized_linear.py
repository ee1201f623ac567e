"""Linear maps by the kernel for experts, which multiplies weights out tile by tile, as a group of one matrix.

Left to the compiler, a step writes the weights it multiplied out to memory and reads them again.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxserve.parallel.mesh import partition_spec
from kernels_pallas.grouped_matmul.api import GroupedMatmul, Matrices
from kernels_pallas.shards import over_model
from kernels_pallas.token_tiles import Blocks


class LinearOps(NamedTuple):
    """How quantised linear maps are computed.

    Attributes:
        matmul: the product of one device.
        mesh: that the weights lie on.
        modules: those that are computed so, by their paths.
    """

    matmul: GroupedMatmul
    mesh: Mesh
    modules: Collection[tuple[str, ...]]


def multiply(
    maths: LinearOps, x_TI: jax.Array, matrices: Matrices, place: jax.Array, axes: tuple[str | None, str | None]
) -> jax.Array:
    """`x W^T` with one layer's matrix.

    Args:
        maths: how.
        x_TI: in whole on every device, unless inputs are split; then in the parts that the devices have.
        matrices: of all layers.
        place: i32, the layer's among them.
        axes: logical ones of outputs and inputs.
    """
    out_axis, in_axis = partition_spec(axes, matrices.values_XOI.shape[1:], maths.mesh)
    form = matrices.form
    assert form is not None
    of_blocks = P(None, out_axis, in_axis if form.block[1] else None)

    def multiply_shard(x_TI: jax.Array, matrices: Matrices, place: jax.Array) -> jax.Array:
        num_tokens, num_inputs = x_TI.shape
        block_rows = maths.matmul.block_rows(num_tokens, 1, num_inputs * x_TI.dtype.itemsize)
        x_PI = jnp.pad(x_TI, ((0, -num_tokens % block_rows), (0, 0)))
        num_blocks = x_PI.shape[0] // block_rows
        group = Blocks(jnp.full(num_blocks, place, jnp.int32), jnp.full(1, num_blocks, jnp.int32))
        y_TO = maths.matmul(x_PI, matrices._replace(form=form), group)[:num_tokens]
        return y_TO if in_axis is None else lax.psum(y_TO, in_axis)

    specs: Any = (P(None, out_axis, in_axis), of_blocks, None if matrices.zero_Xoi is None else of_blocks)
    specs = (P(None, in_axis), Matrices(*specs), P())
    run = over_model(multiply_shard, maths.mesh, specs, P(None, out_axis))
    return run(x_TI, matrices._replace(form=None), place)
