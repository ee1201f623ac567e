"""Blocks of consecutive packed tokens, of one or more rows each, in which the Pallas kernels run prompts."""

import jax
import jax.numpy as jnp

from kernels_pallas.paged_attention.api import AttentionMeta


def rows_of_blocks(meta: AttentionMeta, block_tokens: int, first_row: jax.Array) -> jax.Array:
    """Return the first and the end of the rows in each block of `block_tokens` tokens, i32[2, blocks].

    Rows before `first_row` are left out. The end is at most the first where a block has no rows.
    """
    num_blocks = -(-meta.positions_T.shape[0] // block_tokens)
    start_C = jnp.arange(num_blocks, dtype=jnp.int32) * block_tokens
    starts_B, ends_B = meta.cu_q_lens_B1[:-1], meta.cu_q_lens_B1[1:]
    first_C = jnp.searchsorted(ends_B, start_C, side="right", method="compare_all").astype(jnp.int32)
    end_C = jnp.searchsorted(starts_B, start_C + block_tokens, side="left", method="compare_all").astype(jnp.int32)
    return jnp.stack([jnp.maximum(first_C, first_row), jnp.minimum(end_C, meta.distribution_2[1])])
