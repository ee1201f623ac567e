"""Products of heads with their own matrices on Hopper GPUs, for few tokens.

The heads' activations and results stay where they are, so that nothing is transposed, and matrices are read in the
stack of all layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.grouped_matmul.api import HeadMatrices
from kernels_pallas.grouped_matmul.gpu.kernel import Heads, Launch, Operands, Problem, multiply
from kernels_pallas.grouped_matmul.gpu.tile import MAX_ROWS, MIN_ROWS, Products, choose_tile, multiples
from kernels_pallas.grouped_matmul.gpu.weights import Weight
from kernels_pallas.grouped_matmul.xla.heads import multiply_heads
from kernels_pallas.shards import MODEL, over_model
from kernels_pallas.token_tiles import Blocks, choose_block_rows
from kernels_pallas.warpgroup import WARPGROUP_ROWS


class GpuHeadMatmul:
    """A `HeadMatmul`.

    Args:
        mesh: the devices over which the heads are split.
        num_cores: number of SMs of a device.
        interpret: parameters of the GPU interpret mode, or False to compile.
    """

    def __init__(self, mesh: Mesh, num_cores: int, interpret: Any = False) -> None:
        self._mesh, self._num_cores, self._interpret = mesh, num_cores, interpret

    def __call__(self, x_TNJ: jax.Array, matrices: HeadMatrices, *, transposed: bool = False) -> jax.Array:
        """See `HeadMatmul`."""
        inputs, outputs = multiples(None)
        num_inputs, num_outputs = matrices.number, matrices.stack.shape[2]
        if not transposed:
            num_inputs, num_outputs = num_outputs, num_inputs
        if (
            x_TNJ.shape[0] > MAX_ROWS
            or x_TNJ.dtype != jnp.bfloat16
            or (matrices.head_rows % matrices.number, matrices.first % matrices.number) != (0, 0)
            or (num_inputs % inputs, num_outputs % outputs, x_TNJ.shape[2] % inputs) != (0, 0, 0)
            # The swizzles of both operands would differ.
            or (transposed and num_inputs % WARPGROUP_ROWS)
        ):
            return multiply_heads(x_TNJ, matrices, transposed=transposed)

        def run(x_TNJ: jax.Array, stack: jax.Array, layer: jax.Array) -> jax.Array:
            return self._multiply(x_TNJ, matrices._replace(stack=stack, layer=layer), transposed)

        heads = P(None, MODEL, None)
        return over_model(run, self._mesh, (heads, heads, P()), heads)(x_TNJ, matrices.stack, matrices.layer)

    def _multiply(self, x_TNJ: jax.Array, matrices: HeadMatrices, transposed: bool) -> jax.Array:
        num_tokens, num_heads, columns = x_TNJ.shape
        num_outputs, num_inputs = matrices.number, matrices.stack.shape[2]
        if transposed:
            num_outputs, num_inputs = num_inputs, num_outputs
        rows = choose_block_rows(num_tokens, 1, min_rows=MIN_ROWS, max_rows=MAX_ROWS)
        x_hPB = jnp.pad(x_TNJ.reshape(1, num_tokens, -1), ((0, 0), (0, rows - num_tokens), (0, 0)))
        tile = choose_tile(Products(rows, num_heads, [num_outputs], num_inputs, None), self._num_cores)
        stride = matrices.head_rows // matrices.number
        heads = Heads(num_heads, columns, stride, matrices.first // matrices.number)
        problem = Problem(tile, None, num_inputs // (tile.columns * tile.splits), transposed, heads)
        in_f32 = tile.splits > 1
        out = (tile.splits, num_heads * num_outputs, rows) if in_f32 else (rows, num_heads * num_outputs)
        out_dtype = jnp.dtype(jnp.float32) if in_f32 else x_TNJ.dtype
        grid = {"outputs": num_outputs // tile.outputs, "block": num_heads, "split": tile.splits}
        launch = Launch("head_matmul", grid, [out], out_dtype, self._interpret)
        weights = Weight(matrices.stack.reshape(-1, matrices.number, matrices.stack.shape[2]))
        # The kernel finds the groups itself, and every block is used.
        blocks = Blocks(group_C=matrices.layer[None], end_G=matrices.layer[None])
        (y,) = multiply(Operands(blocks, x_hPB, [weights]), problem, launch)
        y = jnp.sum(y, axis=0).T.astype(x_TNJ.dtype) if in_f32 else y
        return y[:num_tokens].reshape(num_tokens, num_heads, num_outputs)
