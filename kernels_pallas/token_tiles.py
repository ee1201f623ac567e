"""Rows sorted by group into blocks that belong to one group each, as the kernels expect them.

The rows of a group fill whole blocks, the last one padded, so a kernel multiplies every block by one matrix and never
reads the matrix of a group without rows.

Dimension key: R rows, C blocks, P = C * rows per block: block rows, padding included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Blocks(NamedTuple):
    """The group of each block.

    Attributes:
        group_C: i32; unused blocks repeat the group of the last used one.
        num_live_1: i32, number of used blocks, which come first.
    """

    group_C: jax.Array
    num_live_1: jax.Array


class PermutedRows(NamedTuple):
    """The mapping between rows and block rows.

    Attributes:
        row_P: i32, the row in each block row; an arbitrary row for padding.
        block_row_R: i32, the block row of each row; P for rows without a group.
    """

    row_P: jax.Array
    block_row_R: jax.Array


def choose_block_rows(num_rows: int, num_groups: int, *, min_rows: int, max_rows: int) -> int:
    """Round the average rows per group up to a power of two, from `min_rows` to `max_rows` (powers of two)."""
    rows = min_rows
    while rows < min(max_rows, num_rows // num_groups):
        rows *= 2
    return rows


def max_num_blocks(num_rows: int, num_groups: int, block_rows: int) -> int:
    """Return the maximum number of blocks that rows need, however they are distributed over groups."""
    # Every group with rows fills all but its last block.
    return (num_rows + min(num_rows, num_groups) * (block_rows - 1)) // block_rows


def sort_into_blocks(group_R: jax.Array, num_groups: int, block_rows: int) -> tuple[Blocks, PermutedRows]:
    """Sort rows into blocks by group; the rows of a group keep their order.

    Args:
        group_R: i32, the group of each row; `num_groups` for rows without a group.
        num_groups: number of groups.
        block_rows: rows per block.
    """
    num_rows = group_R.shape[0]
    num_blocks = max_num_blocks(num_rows, num_groups, block_rows)
    order_R = jnp.argsort(group_R, stable=True).astype(jnp.int32)
    size_G = jnp.zeros(num_groups, jnp.int32).at[group_R].add(1, mode="drop")
    end_G = jnp.cumsum(size_G)
    end_block_G = jnp.cumsum(-(-size_G // block_rows))
    sorted_R = group_R[order_R]
    known_R = jnp.minimum(sorted_R, num_groups - 1)
    first_row_G = (end_block_G - -(-size_G // block_rows)) * block_rows
    block_row_R = first_row_G[known_R] + jnp.arange(num_rows, dtype=jnp.int32) - (end_G - size_G)[known_R]
    block_row_R = jnp.where(sorted_R < num_groups, block_row_R, num_blocks * block_rows)
    row_P = jnp.zeros(num_blocks * block_rows, jnp.int32).at[block_row_R].set(order_R, mode="drop")
    num = end_block_G[-1]
    block_C = jnp.minimum(jnp.arange(num_blocks, dtype=jnp.int32), jnp.maximum(num - 1, 0))
    group_C = jnp.searchsorted(end_block_G, block_C, side="right", method="compare_all").astype(jnp.int32)
    # If no row has a group, `searchsorted` returns `num_groups`.
    group_C = jnp.minimum(group_C, num_groups - 1)
    return Blocks(group_C, num[None]), PermutedRows(row_P, jnp.zeros_like(block_row_R).at[order_R].set(block_row_R))
