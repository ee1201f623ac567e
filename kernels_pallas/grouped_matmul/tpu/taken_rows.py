"""Takes the rows of a block from all tokens, which lie in VMEM.

XLA would write the rows of all blocks to memory and read them again: with few tokens per expert, most of them padding.

Dimension key: see `backend`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.pallas import pl, pltpu

# Bytes of the f32 values of all tokens, up to which they are kept in VMEM.
_MAX_BYTES = 8 << 20


def can_take(x_TI: jax.Array) -> bool:
    """Return whether the kernel takes rows of these tokens."""
    return 4 * x_TI.size <= _MAX_BYTES and x_TI.dtype in (jnp.float32, jnp.bfloat16)


def scratch_shapes(rows: Sequence[jax.Array], block_rows: int) -> list[Any]:
    """Return the scratch for `take_block`: the rows of a block, and their f32 values."""
    shapes = [(block_rows, x.shape[1]) for x in rows]
    of_block = [pltpu.VMEM(shape, x.dtype) for shape, x in zip(shapes, rows, strict=True)]
    return [*of_block, *(pltpu.VMEM(shape, jnp.float32) for shape in shapes)]


def take_block(row_P: Any, first: jax.Array, x_TI: Any, rows_WI: Any, wide_WI: Any) -> None:
    """Copy rows of tokens to a block.

    Args:
        row_P: i32 in SMEM, the token of each row of the blocks.
        first: index of the block's first row.
        x_TI: f32, all tokens: single rows of 16 bits cannot be addressed.
        rows_WI: the rows of the block.
        wide_WI: scratch for their f32 values.
    """

    def copy(index: jax.Array, _: None) -> None:
        wide_WI[pl.ds(index, 1)] = x_TI[pl.ds(row_P[first + index], 1)]

    lax.fori_loop(0, rows_WI.shape[0], copy, None)
    rows_WI[...] = wide_WI[...].astype(rows_WI.dtype)
