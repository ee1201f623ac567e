"""The rows, positions and pages that a program of the TPU attention kernel reads.

The kernel calls these functions with traced integers, `decode_bytes` with plain ones.

Dimension key: see `api`; C query blocks of W tokens, Q = W * G query rows per key head, E keys of a buffer.
"""

import dataclasses
from collections import Counter
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels_pallas.paged_attention.api import AttentionConfig
from kernels_pallas.paged_attention.tpu.layout import LANES, TpuLayout

Int = Any
"""A number: traced in the kernel, plain elsewhere."""

# Arrays of scores that the compiler keeps at the same time, besides the scratch that the kernel declares.
_SCORE_COPIES = 4


class CoreShares(NamedTuple):
    """What the cores of a device share.

    Attributes:
        num_cores: cores that take part.
        of_heads: whether each core has some of the key heads, instead of every other row of one token.
    """

    num_cores: int = 1
    of_heads: bool = False

    @property
    def stride(self) -> int:
        """Distance between the blocks of a core."""
        return 1 if self.of_heads else self.num_cores

    def block(self, core: Int, index: Int) -> Int:
        """Return the index of a core's block, which may be after the last one."""
        return index if self.of_heads else index * self.num_cores + core


ONE_CORE = CoreShares()


def share_cores(num_cores: int, num_kv_heads: int, *, num_rows: int | None) -> CoreShares:
    """Choose what the cores share: heads, or rows of one token; one core runs blocks that write and read one row.

    Args:
        num_cores: cores of a device.
        num_kv_heads: key heads of a device.
        num_rows: rows of one token that the step is compiled for; None for blocks of tokens.
    """
    if num_cores > 1 and num_kv_heads % num_cores == 0:
        return CoreShares(num_cores, of_heads=True)
    return CoreShares(num_cores) if num_rows is not None and num_rows >= num_cores else ONE_CORE


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelShape:
    """Static parameters of the kernel.

    Attributes:
        config: config with the heads of one core, and not the model's; of a shard where tiles are chosen, which then
            fit either way.
        layout: layout of the cache.
        block_tokens: tokens per query block, W.
        pages_per_buffer: pages that one key buffer holds.
        num_table_entries: pages per row of the page table, M.
        cores: what the cores of a device share.
    """

    config: AttentionConfig
    layout: TpuLayout
    block_tokens: int
    pages_per_buffer: int
    num_table_entries: int
    cores: CoreShares = ONE_CORE

    @property
    def fused_write(self) -> bool:
        """Whether the new token is written from the buffer that holds its page."""
        return self.block_tokens == 1

    @property
    def group(self) -> int:
        """Query heads per key head, G."""
        return self.config.num_q_heads // self.config.num_kv_heads

    @property
    def block_rows(self) -> int:
        """Query rows of a block per key head, Q."""
        return self.block_tokens * self.group

    @property
    def buffer_tokens(self) -> int:
        """Keys of a buffer, E."""
        return self.pages_per_buffer * self.config.page_size

    @property
    def stage_tokens(self) -> int:
        """Tokens of the staging buffer, in which new tokens are aligned to the pages' tiles."""
        return -(-self.block_tokens // self.layout.sublanes) * self.layout.sublanes + self.layout.sublanes

    @property
    def vmem_bytes(self) -> int:
        """Approximate bytes of VMEM that the kernel uses."""
        config, layout = self.config, self.layout
        cached, computed = jnp.dtype(config.dtype).itemsize, jnp.dtype(config.compute_dtype).itemsize
        token = layout.lanes * cached
        # The pipeline double-buffers the blocks of queries, new tokens and outputs.
        head_lanes = layout.query_lanes + layout.result_lanes
        blocks = 2 * (self.block_rows * head_lanes * computed + self.block_tokens * token)
        state = self.block_rows * (2 * LANES + layout.result_lanes) * 4
        buffers = (2 * self.buffer_tokens + self.stage_tokens) * token
        scores = _SCORE_COPIES * self.block_rows * self.buffer_tokens * 4
        return config.num_kv_heads * (blocks + state + buffers) + scores


class Scalars(NamedTuple):
    """Scalar operands, prefetched to SMEM.

    Attributes:
        first_page_1: i32, first page of the layer.
        kv_lens_B, cu_q_lens_B1: see `AttentionMeta`.
        page_table_F: i32, `page_table_BM` flattened.
        block_rows_2C: i32, first and end of the rows in each block; with a single entry if every block is a row.
    """

    first_page_1: Any
    kv_lens_B: Any
    cu_q_lens_B1: Any
    page_table_F: Any
    block_rows_2C: Any


class Span(NamedTuple):
    """The tokens of a row in a block; all fields are i32.

    Attributes:
        row: index of the row.
        token: index of the first token in the block.
        start, end: range of the tokens' positions in the row.
        lowest: lowest position that any of them sees.
    """

    row: Int
    token: Int
    start: Int
    end: Int
    lowest: Int


def span_of(shape: KernelShape, scalars: Scalars, block: Int, row: Int) -> Span:
    """Return the span of a row in a block that overlaps it."""
    first_token = block * shape.block_tokens
    row_end = scalars.cu_q_lens_B1[row + 1]
    first = jnp.maximum(scalars.cu_q_lens_B1[row], first_token)
    end = jnp.minimum(row_end, first_token + shape.block_tokens)
    position = scalars.kv_lens_B[row] - row_end
    window = shape.config.window
    lowest = 0 if window is None else jnp.maximum(first + position + 1 - window, 0)
    return Span(row, first - first_token, first + position, end + position, jnp.int32(lowest))


def page_range(shape: KernelShape, span: Span, buffer: Int) -> tuple[Int, Int]:
    """Return the first and the end of the pages that a span needs from the `buffer`-th E keys of its row."""
    per_buffer, page_size = shape.pages_per_buffer, shape.config.page_size
    first = jnp.maximum(span.lowest // page_size, buffer * per_buffer)
    end = jnp.minimum(-(-span.end // page_size), (buffer + 1) * per_buffer)
    return first, end


def decode_bytes(shape: KernelShape, kv_lens: list[int]) -> int:
    """Return the bytes moved between HBM and chip for one layer of a decode step, by the schedule above.

    Per row: the pages that it sees, the tile with its new token, a query and an output per head, and the new token.
    """
    config, layout = shape.config, shape.layout
    token = config.num_kv_heads * layout.lanes * jnp.dtype(config.dtype).itemsize
    head = (layout.query_lanes + layout.result_lanes) * jnp.dtype(config.compute_dtype).itemsize
    pages = sum(count * _num_pages(shape, kv_len) for kv_len, count in Counter(kv_lens).items())
    per_row = (layout.sublanes + 1) * token + config.num_q_heads * head
    return pages * config.page_size * token + len(kv_lens) * per_row


def _num_pages(shape: KernelShape, kv_len: int) -> int:
    """Return the pages that a row of one token reads."""
    scalars = Scalars(None, np.asarray([kv_len], np.int32), np.arange(2, dtype=np.int32), None, None)
    span = span_of(shape, scalars, 0, 0)
    pages = 0
    for buffer in range(int(span.lowest) // shape.buffer_tokens, -(-int(span.end) // shape.buffer_tokens)):
        first, end = page_range(shape, span, buffer)
        pages += int(end - first)
    return pages
