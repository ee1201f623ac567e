"""What a program of the TPU attention kernel reads: which rows, which positions of them, which pages.

The kernel runs these functions on traced numbers, the byte count below on plain ones.

Dimension key: see `api`; C query blocks, W tokens of one, Q = W * G rows per key head, E keys of a buffer.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels_pallas.paged_attention.api import AttentionConfig
from kernels_pallas.paged_attention.tpu.layout import LANES, TpuLayout

Int = Any
"""A number: traced in the kernel, plain elsewhere."""

# Arrays of scores that the compiler keeps at once, besides what the kernel declares.
_SCORE_COPIES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelShape:
    """What is fixed when the kernel is traced.

    Attributes:
        config: config of the shard: its heads, not the model's.
        layout: layout of the cache.
        block_tokens: W.
        pages_per_buffer: pages that one key buffer holds.
        num_table_entries: M.
    """

    config: AttentionConfig
    layout: TpuLayout
    block_tokens: int
    pages_per_buffer: int
    num_table_entries: int

    @property
    def fused_write(self) -> bool:
        """The new token is written from the buffer that holds its page."""
        return self.block_tokens == 1

    @property
    def group(self) -> int:
        """G."""
        return self.config.num_q_heads // self.config.num_kv_heads

    @property
    def block_rows(self) -> int:
        """Q."""
        return self.block_tokens * self.group

    @property
    def buffer_tokens(self) -> int:
        """E."""
        return self.pages_per_buffer * self.config.page_size

    @property
    def stage_tokens(self) -> int:
        """Tokens of the buffer that new tokens are aligned to the pages' tiles in."""
        return -(-self.block_tokens // self.layout.sublanes) * self.layout.sublanes + self.layout.sublanes

    @property
    def vmem_bytes(self) -> int:
        """Memory on the chip that the kernel takes, about."""
        config, layout = self.config, self.layout
        cached, computed = jnp.dtype(config.dtype).itemsize, jnp.dtype(config.compute_dtype).itemsize
        token = layout.lanes * cached
        # The pipeline keeps two blocks of queries, new tokens and results.
        head_lanes = layout.query_lanes + layout.result_lanes
        blocks = 2 * (self.block_rows * head_lanes * computed + self.block_tokens * token)
        state = self.block_rows * (2 * LANES + layout.result_lanes) * 4
        buffers = (2 * self.buffer_tokens + self.stage_tokens) * token
        scores = _SCORE_COPIES * self.block_rows * self.buffer_tokens * 4
        return config.num_kv_heads * (blocks + state + buffers) + scores


class Scalars(NamedTuple):
    """Operands that are read one number at a time.

    Attributes:
        first_page_1: i32, first page of the layer.
        kv_lens_B, cu_q_lens_B1: see `AttentionMeta`.
        page_table_F: i32, `page_table_BM` flat.
        block_rows_2C: i32, first row of each block and the end of its rows.
    """

    first_page_1: Any
    kv_lens_B: Any
    cu_q_lens_B1: Any
    page_table_F: Any
    block_rows_2C: Any


class Span(NamedTuple):
    """The tokens of a row in a block, i32 each.

    Attributes:
        row: index.
        token: first token, in the block.
        start, end: positions of the tokens.
        lowest: first position that any of them sees.
    """

    row: Int
    token: Int
    start: Int
    end: Int
    lowest: Int


def span_of(shape: KernelShape, scalars: Scalars, block: Int, row: Int) -> Span:
    """The span of a row in a block that overlaps it."""
    first_token = block * shape.block_tokens
    row_end = scalars.cu_q_lens_B1[row + 1]
    first = jnp.maximum(scalars.cu_q_lens_B1[row], first_token)
    end = jnp.minimum(row_end, first_token + shape.block_tokens)
    position = scalars.kv_lens_B[row] - row_end
    window = shape.config.window
    lowest = 0 if window is None else jnp.maximum(first + position + 1 - window, 0)
    return Span(row, first - first_token, first + position, end + position, jnp.int32(lowest))


def page_range(shape: KernelShape, span: Span, buffer: Int) -> tuple[Int, Int]:
    """First and end of the pages that a span needs of the `buffer`-th stretch of E keys."""
    per_buffer, page_size = shape.pages_per_buffer, shape.config.page_size
    first = jnp.maximum(span.lowest // page_size, buffer * per_buffer)
    end = jnp.minimum(-(-span.end // page_size), (buffer + 1) * per_buffer)
    return first, end


def decode_bytes(shape: KernelShape, kv_lens: list[int]) -> int:
    """Bytes between memory and chip for one layer of a decode step, by the schedule above.

    Per row: the pages that it sees, the tile with its new token, a query and a result per head, and the new token.
    """
    config, layout = shape.config, shape.layout
    count = len(kv_lens)
    scalars = Scalars(None, np.asarray(kv_lens, np.int32), np.arange(count + 1, dtype=np.int32), None, None)
    token = config.num_kv_heads * layout.lanes * jnp.dtype(config.dtype).itemsize
    head = (layout.query_lanes + layout.result_lanes) * jnp.dtype(config.compute_dtype).itemsize
    pages = 0
    for row in range(count):
        span = span_of(shape, scalars, row, row)
        for buffer in range(int(span.lowest) // shape.buffer_tokens, -(-int(span.end) // shape.buffer_tokens)):
            first, end = page_range(shape, span, buffer)
            pages += int(end - first)
    return pages * config.page_size * token + count * ((layout.sublanes + 1) * token + config.num_q_heads * head)
