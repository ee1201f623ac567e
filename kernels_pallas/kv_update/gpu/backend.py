"""Write a step's keys and values into their pages, in place.

Dimension key: T packed tokens, K key/value heads, H head dim, S page size, P pages of one layer, L layers,
W tokens of one thread block.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import lax

from kernels_pallas.pallas import pl, plgpu

# Maximum size of a thread block's keys and values, so that several blocks share an SM.
_MAX_BYTES = 64 * 1024
_MAX_TOKENS = 16
_MAX_WIDTH = 256
# TMA reads and writes shared memory at multiples of this many bytes.
_ALIGNMENT = 128


def kv_update(
    new_TKH: Sequence[jax.Array],
    pages_PKSH: Sequence[jax.Array],
    slot_T: jax.Array,
    layer: jax.Array,
    pages_per_layer: int,
    interpret: Any = False,
) -> list[jax.Array]:
    """Write each token's keys and values to its slot; slots past the layer's pages are padding and are dropped.

    The caches are updated in place if the caller does not use the old ones again.

    Args:
        new_TKH: this step's keys and values, in the cache's dtype; only keys if values are part of them.
        pages_PKSH: the caches of keys and values: pages of all layers.
        slot_T: i32, `page_id * page_size + offset` within a layer.
        layer: i32, index of the layer.
        pages_per_layer: number of pages of a layer.
        interpret: parameters of the GPU interpret mode, or False to compile.
    """
    num_tokens, num_heads, head_dim = new_TKH[0].shape
    dtype = new_TKH[0].dtype
    token_bytes = len(new_TKH) * num_heads * head_dim * dtype.itemsize
    tokens = math.gcd(num_tokens, min(_MAX_TOKENS, 1 << max(0, (_MAX_BYTES // token_bytes).bit_length() - 1)))
    # Wider heads are split: TMA copies at most `_MAX_WIDTH` elements of an axis.
    width = head_dim if head_dim <= _MAX_WIDTH else math.gcd(head_dim, _MAX_WIDTH)
    tiling = plgpu.TilingTransform((width,))  # pyright: ignore[reportAbstractUsage]
    transforms = () if width == head_dim else (tiling,)
    # A token's heads that do not fill whole multiples need a buffer of their own. (One head is copied without a tensor
    # map, which needs only 16 bytes.)
    apart = num_heads > 1 and num_heads * head_dim * dtype.itemsize % _ALIGNMENT != 0
    shape = (num_heads, head_dim)
    buffers: Any = plgpu.SMEM((tokens, *shape), dtype, transforms=transforms)
    if apart:
        buffers = [plgpu.SMEM(shape, dtype, transforms=transforms)] * tokens
    # Every call needs a new function: a function that is reused with another grid keeps its first trace.
    write = plgpu.kernel(
        partial(_write_block, tokens=tokens, pages_per_layer=pages_per_layer),
        out_type=(),
        scratch_types=[
            [buffers] * len(new_TKH),
            plgpu.Barrier(num_arrivals=len(new_TKH) * (tokens if apart else 1)),
        ],
        grid=(num_tokens // tokens,),
        grid_names=("block",),
        kernel_name="kv_update",
        interpret=interpret,
    )
    # The caches are written through refs, so that the compiler aliases them instead of copying.
    refs = [jax.new_ref(pages) for pages in pages_PKSH]
    write(list(new_TKH), refs, slot_T, layer[None])
    return [jax.freeze(ref) for ref in refs]


def _write_block(
    new_TKH: list[Any],
    pages_PKSH: list[Any],
    slot_T: Any,
    layer_1: Any,
    buffers_WKH: list[Any | list[Any]],
    arrived: Any,
    *,
    tokens: int,
    pages_per_layer: int,
) -> None:
    """Load a block's tokens in one copy, or each in its own, then write each to its slot in one copy for all heads."""
    page_size = pages_PKSH[0].shape[2]
    start = lax.axis_index("block") * tokens
    for new, buffer in zip(new_TKH, buffers_WKH, strict=True):
        if isinstance(buffer, list):
            for token, own in enumerate(buffer):
                plgpu.copy_gmem_to_smem(new.at[start + token], own, arrived)
        else:
            plgpu.copy_gmem_to_smem(new.at[pl.ds(start, tokens)], buffer, arrived)
    plgpu.barrier_wait(arrived)
    first_page = layer_1[0] * pages_per_layer
    for token in range(tokens):
        slot = slot_T[start + token]
        page, offset = first_page + lax.div(slot, page_size), lax.rem(slot, page_size)

        @pl.when((slot >= 0) & (slot < pages_per_layer * page_size))
        def _write(token: int = token, page: jax.Array = page, offset: jax.Array = offset) -> None:
            for buffer, pages in zip(buffers_WKH, pages_PKSH, strict=True):
                own = buffer[token] if isinstance(buffer, list) else buffer.at[token]
                plgpu.copy_smem_to_gmem(own, pages.at[page, :, offset], commit_group=False)

    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)
