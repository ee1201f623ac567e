"""The end of the grouped matmul's kernels on Hopper GPUs: biases, and results of 16 bits.

Dimension key: as in `gpu/backend.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.pallas import plgpu
from kernels_pallas.warpgroup import ROWS


def add_bias(sum_om: jax.Array, bias_O: Any) -> jax.Array:
    """Add the biases of the outputs, which are in global memory, or None."""
    if bias_O is None:
        return sum_om
    bias_o = plgpu.load(bias_O, layout=ROWS, optimized=False)
    return sum_om + lax.broadcast_in_dim(bias_o.astype(jnp.float32), sum_om.shape, [0])


def round_into(sum_om: jax.Array, buffer_mo: Any) -> None:
    """Round sums to a buffer of 16 bits in shared memory, transposed."""
    buffer_mo.T[...] = plgpu.layout_cast(sum_om.astype(buffer_mo.dtype), plgpu.Layout.WGMMA_TRANSPOSED)


def copy_out(buffer: Any, target: Any) -> None:
    """Copy a buffer that this warpgroup has written to global memory, and wait until it is copied."""
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, target)
    plgpu.wait_smem_to_gmem(0)
