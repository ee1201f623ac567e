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
        end_G: i32, the end of each group's blocks. The last one, of which there is at least one, is the number of used
            blocks.
    """

    group_C: jax.Array
    end_G: jax.Array

    @property
    def num_live(self) -> jax.Array:
        """Number of used blocks, which come first; also of references to arrays."""
        return self.end_G[self.end_G.shape[0] - 1]


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


def sort_into_blocks(
    group_R: jax.Array, num_groups: int, block_rows: int, *, first_group: jax.Array | int = 0, max_compared: int = 0
) -> tuple[Blocks, PermutedRows]:
    """Sort rows into blocks by group; the rows of a group keep their order.

    Args:
        group_R: i32, the group of each row; `num_groups` for rows without a group.
        num_groups: number of groups.
        block_rows: rows per block.
        first_group: i32, added to the groups of the blocks.
        max_compared: rows times block rows up to which everything is compared with everything instead of sorted.
    """
    num_rows = group_R.shape[0]
    num_blocks = max_num_blocks(num_rows, num_groups, block_rows)
    sort = _sort_by_comparing if num_rows * num_blocks * block_rows <= max_compared else _sort
    end_G, permuted = sort(group_R, num_groups, block_rows, num_blocks)
    block_C = jnp.minimum(jnp.arange(num_blocks, dtype=jnp.int32), jnp.maximum(end_G[-1] - 1, 0))
    # The last group's end is left out: if no row has a group, all groups end before the first block.
    is_after_CG = end_G[None, :-1] <= block_C[:, None]
    group_C = jnp.sum(is_after_CG, axis=1, dtype=jnp.int32, initial=jnp.asarray(first_group, jnp.int32))
    return Blocks(group_C, end_G), permuted


def _sort(group_R: jax.Array, num_groups: int, block_rows: int, num_blocks: int) -> tuple[jax.Array, PermutedRows]:
    """Return the end of each group's blocks, and the mapping between rows and block rows."""
    num_rows = group_R.shape[0]
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
    return end_block_G, PermutedRows(row_P, jnp.zeros_like(block_row_R).at[order_R].set(block_row_R))


def _sort_by_comparing(
    group_R: jax.Array, num_groups: int, block_rows: int, num_blocks: int
) -> tuple[jax.Array, PermutedRows]:
    """Like `_sort`, by comparing everything with everything: a few reductions instead of a sort and scatters."""
    group_G, row_R = jnp.arange(num_groups), jnp.arange(group_R.shape[0])
    size_G = _count(group_R[None, :] == group_G[:, None])
    end_block_G = _sum(-(-size_G // block_rows)[None, :], group_G[None, :] <= group_G[:, None])
    before_RR = (group_R[None, :] == group_R[:, None]) & (row_R[None, :] < row_R[:, None])
    # The blocks of the group before end where those of the group start.
    first_block_R = jnp.where(group_R > 0, end_block_G[jnp.clip(group_R - 1, 0, num_groups - 1)], 0)
    block_row_R = first_block_R * block_rows + _count(before_RR)
    block_row_R = jnp.where(group_R < num_groups, block_row_R, num_blocks * block_rows)
    in_place_PR = block_row_R[None, :] == jnp.arange(num_blocks * block_rows)[:, None]
    return end_block_G, PermutedRows(_sum(row_R[None, :], in_place_PR), block_row_R)


def _count(matrix: jax.Array) -> jax.Array:
    """Return how many entries of each row are true, i32."""
    return jnp.sum(matrix, axis=1, dtype=jnp.int32)


def _sum(values: jax.Array, where: jax.Array) -> jax.Array:
    """Return the sum of the entries of each row for which `where` is true, i32."""
    return jnp.sum(jnp.where(where, values, 0), axis=1, dtype=jnp.int32)
