"""Metadata for parts of a step: rows that run a single token, and prompts, in the same or in another page pool.

Dimension key: see `api`; P pages of the other pool.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.paged_attention.api import AttentionMeta
from kernels_pallas.paged_attention.xla.pages import expand

# A slot past the end of any pool.
_NO_SLOT = jnp.iinfo(jnp.int32).max


class RemappedPages(NamedTuple):
    """The pages of a step's rows, packed row after row into another pool.

    Attributes:
        page_P: i32, the original page of each page of the pool; arbitrary from `num_live` on.
        num_live: i32, number of live pages.
    """

    page_P: jax.Array
    num_live: jax.Array


def decode_meta(meta: AttentionMeta) -> AttentionMeta:
    """Return the metadata of the rows that run a single token, with T = B."""
    num_single = meta.distribution_2[0]
    row_B = jnp.arange(meta.kv_lens_B.shape[0])
    return meta._replace(
        kv_lens_B=jnp.where(row_B < num_single, meta.kv_lens_B, 0),
        cu_q_lens_B1=jnp.minimum(meta.cu_q_lens_B1, num_single),
        distribution_2=jnp.stack([num_single, num_single]),
        slot_mapping_T=jnp.where(row_B < num_single, meta.slot_mapping_T[row_B], _NO_SLOT),
        positions_T=meta.positions_T[row_B],
    )


def prefill_meta(meta: AttentionMeta) -> AttentionMeta:
    """Return the metadata of the rows that run several tokens.

    Tokens keep their indices, so the first row need not start at token 0.
    """
    num_rows, (num_single, num_live) = meta.kv_lens_B.shape[0], meta.distribution_2
    row_B = jnp.arange(num_rows) + num_single
    taken_B = jnp.minimum(row_B, num_rows - 1)
    cu_q_lens_B1 = meta.cu_q_lens_B1[jnp.minimum(jnp.arange(num_rows + 1) + num_single, num_rows)]
    return meta._replace(
        kv_lens_B=jnp.where(row_B < num_live, meta.kv_lens_B[taken_B], 0),
        page_table_BM=meta.page_table_BM[taken_B],
        cu_q_lens_B1=cu_q_lens_B1,
        distribution_2=jnp.stack([jnp.zeros_like(num_single), num_live - num_single]),
    )


def remap_pages(meta: AttentionMeta, page_size: int, num_pages: int) -> tuple[AttentionMeta, RemappedPages]:
    """Return the metadata of the same rows in another pool, and the original pages.

    The pool has `num_pages` pages, which must be enough for all rows.
    """
    count_B = -(-meta.kv_lens_B // page_size)
    first_B = (jnp.cumsum(count_B) - count_B).astype(jnp.int32)
    row_P, index_P, num_live = expand(count_B, num_pages)
    token_T = jnp.arange(meta.positions_T.shape[0])
    row_T = jnp.searchsorted(meta.cu_q_lens_B1[1:], token_T, side="right", method="compare_all")
    is_live_T = (token_T >= meta.cu_q_lens_B1[0]) & (row_T < meta.distribution_2[1])
    slot_T = first_B[jnp.minimum(row_T, first_B.shape[0] - 1)] * page_size + meta.positions_T
    index_M = jnp.arange(min(meta.page_table_BM.shape[1], num_pages), dtype=jnp.int32)
    remapped = meta._replace(
        page_table_BM=jnp.minimum(first_B[:, None] + index_M, num_pages - 1),
        slot_mapping_T=jnp.where(is_live_T, slot_T, _NO_SLOT),
    )
    return remapped, RemappedPages(meta.page_table_BM[row_P, index_P], num_live)
