"""Tile sizes of the TPU attention kernel."""

from typing import NamedTuple

import jax.numpy as jnp

from kernels_pallas.paged_attention.api import AttentionConfig
from kernels_pallas.paged_attention.tpu.layout import TpuLayout
from kernels_pallas.paged_attention.tpu.schedule import KernelShape

# Fraction of the on-chip memory that a kernel may use.
VMEM_FRACTION = 0.9
# Bytes of a key buffer: large enough that its transfer takes much longer than a copy's latency, small enough that short
# rows waste little.
_BUFFER_BYTES = 1 << 20
_MIN_BUFFER_TOKENS, _MAX_BUFFER_TOKENS = 128, 1024
# Query rows per key head: enough to keep the MXU busy between loads of keys.
_BLOCK_ROWS = 512
_MIN_BLOCK_TOKENS, _MAX_BLOCK_TOKENS = 8, 128
# What may be faster on a device than the formula's choice.
_BLOCK_TOKENS, _BUFFER_TOKENS = (8, 16, 32, 64, 128), (128, 256, 512, 1024, 2048)


class TpuTiles(NamedTuple):
    """Tiles of the TPU kernel.

    Attributes:
        block_tokens: packed tokens per prefill block.
        pages_per_buffer: pages per key buffer, of which there are two.
    """

    block_tokens: int
    pages_per_buffer: int


def choose_tpu_tiles(config: AttentionConfig, layout: TpuLayout, vmem_bytes: int) -> TpuTiles:
    """Return the largest tiles for the heads of one shard that fit the chip.

    Raises:
        NotImplementedError: even the smallest tiles do not fit.
    """
    group = config.num_q_heads // config.num_kv_heads
    block_tokens = 1 << min(_MAX_BLOCK_TOKENS, max(_MIN_BLOCK_TOKENS, _BLOCK_ROWS // group)).bit_length() - 1
    token_bytes = config.num_kv_heads * layout.lanes * jnp.dtype(config.dtype).itemsize
    tokens = min(max(_BUFFER_BYTES // token_bytes, _MIN_BUFFER_TOKENS), _MAX_BUFFER_TOKENS)
    pages = max(1, tokens // config.page_size)
    while True:
        tiles = TpuTiles(block_tokens, pages)
        needed = _vmem_bytes(config, layout, tiles)
        if needed <= vmem_bytes * VMEM_FRACTION:
            return tiles
        if block_tokens > _MIN_BLOCK_TOKENS:
            block_tokens //= 2
        elif pages > 1:
            pages //= 2
        else:
            raise NotImplementedError(
                f"{config.num_kv_heads} key heads of {config.head_dim} in pages of {config.page_size} tokens need "
                f"{needed} bytes on the chip, which has {vmem_bytes}"
            )


def legal_tpu_tiles(config: AttentionConfig, layout: TpuLayout, vmem_bytes: int) -> list[TpuTiles]:
    """Return the tiles that fit, that of `choose_tpu_tiles` first; see `choose_tpu_tiles`."""
    others = (
        TpuTiles(block_tokens, tokens // config.page_size)
        for block_tokens in _BLOCK_TOKENS
        for tokens in _BUFFER_TOKENS
        if tokens >= config.page_size
    )
    fit = (tiles for tiles in others if _vmem_bytes(config, layout, tiles) <= vmem_bytes * VMEM_FRACTION)
    return list(dict.fromkeys((choose_tpu_tiles(config, layout, vmem_bytes), *fit)))


def _vmem_bytes(config: AttentionConfig, layout: TpuLayout, tiles: TpuTiles) -> int:
    shape = KernelShape(
        config=config,
        layout=layout,
        block_tokens=tiles.block_tokens,
        pages_per_buffer=tiles.pages_per_buffer,
        num_table_entries=0,
    )
    return shape.vmem_bytes
