"""Write a step's keys and values into their pages, in place.

Dimension key: T packed tokens, K key/value heads, H head dim, S page size, P pages of one layer, L layers,
W tokens of one thread block.
"""

import math
from functools import partial
from typing import Any

import jax
from jax import lax

from kernels_pallas.pallas import pl, plgpu

# A thread block's keys and values: several blocks then share a multiprocessor.
_MAX_BYTES = 64 * 1024
_MAX_TOKENS = 16


def kv_update(
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    keys_PKSH: jax.Array,
    values_PKSH: jax.Array,
    slot_T: jax.Array,
    first_page: jax.Array,
    pages_per_layer: int,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Put each token's keys and values into its slot; slots past the layer's pages are padding and dropped.

    The caches come back in the buffers they came in when the caller does not use the old ones again.

    Args:
        k_TKH: this step's keys, in the cache's dtype.
        v_TKH: its values.
        keys_PKSH: keys in the pages of all layers.
        values_PKSH: values in them.
        slot_T: i32, `page_id * page_size + offset` within a layer.
        first_page: i32, first page of the layer.
        pages_per_layer: how many pages it has.
        interpret: parameters of the GPU interpret mode, or False to compile.
    """
    num_tokens, num_heads, head_dim = k_TKH.shape
    token_bytes = 2 * num_heads * head_dim * k_TKH.dtype.itemsize
    tokens = math.gcd(num_tokens, min(_MAX_TOKENS, 1 << max(0, (_MAX_BYTES // token_bytes).bit_length() - 1)))
    scratch = plgpu.SMEM((tokens, num_heads, head_dim), k_TKH.dtype)
    # A fresh function per call: one that is reused with another grid keeps its first trace.
    write = plgpu.kernel(
        partial(_write_block, tokens=tokens, pages_per_layer=pages_per_layer),
        out_type=(),
        scratch_types=[scratch, scratch, plgpu.Barrier(num_arrivals=2)],
        grid=(num_tokens // tokens,),
        grid_names=("block",),
        kernel_name="kv_update",
        interpret=interpret,
    )
    # Written through references, so that the compiler aliases the caches instead of copying them.
    keys_ref, values_ref = jax.new_ref(keys_PKSH), jax.new_ref(values_PKSH)
    write(k_TKH, v_TKH, slot_T, first_page[None], keys_ref, values_ref)
    return jax.freeze(keys_ref), jax.freeze(values_ref)


def _write_block(
    k_TKH: Any,
    v_TKH: Any,
    slot_T: Any,
    first_page_1: Any,
    keys_PKSH: Any,
    values_PKSH: Any,
    k_WKH: Any,
    v_WKH: Any,
    arrived: Any,
    *,
    tokens: int,
    pages_per_layer: int,
) -> None:
    """Bring one block's tokens in with one copy, send each to its slot with one copy for all heads."""
    page_size = keys_PKSH.shape[2]
    start = lax.axis_index("block") * tokens
    plgpu.copy_gmem_to_smem(k_TKH.at[pl.ds(start, tokens)], k_WKH, arrived)
    plgpu.copy_gmem_to_smem(v_TKH.at[pl.ds(start, tokens)], v_WKH, arrived)
    plgpu.barrier_wait(arrived)
    first_page = first_page_1[0]
    for token in range(tokens):
        slot = slot_T[start + token]
        page, offset = first_page + lax.div(slot, page_size), lax.rem(slot, page_size)

        @pl.when((slot >= 0) & (slot < pages_per_layer * page_size))
        def _write(token: int = token, page: jax.Array = page, offset: jax.Array = offset) -> None:
            plgpu.copy_smem_to_gmem(k_WKH.at[token], keys_PKSH.at[page, :, offset], commit_group=False)
            plgpu.copy_smem_to_gmem(v_WKH.at[token], values_PKSH.at[page, :, offset], commit_group=False)

    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)
