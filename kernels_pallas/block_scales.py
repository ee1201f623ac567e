"""Matrices of 8-bit numbers with a factor for each block of them (arXiv:2412.19437, section 3.3.2)."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def dequantize_blocks(w_OI: jax.Array, scale_oi: jax.Array, block: tuple[int, int], dtype: DTypeLike) -> jax.Array:
    """Each number times its block's factor.

    Args:
        w_OI: the numbers.
        scale_oi: f32, of each block.
        block: its rows and columns; the last ones may have fewer.
        dtype: of the result; products are in f32.
    """
    num_rows, num_columns = w_OI.shape
    scale_OI = jnp.repeat(jnp.repeat(scale_oi, block[0], axis=0)[:num_rows], block[1], axis=1)[:, :num_columns]
    return (w_OI.astype(jnp.float32) * scale_OI).astype(dtype)
