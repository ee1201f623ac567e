"""The TPU attention kernel: query blocks attend the pages of their rows.

A program handles one block of W consecutive packed tokens, for all heads. It loops over the rows that have tokens in
the block; for each it writes the new keys and values, then streams the row's pages through two buffers. With W = 1 the
block is a row: its new token is blended into the buffer that holds its page, and the next row's first pages are
fetched while this row's last ones are attended.

Dimension key: see `api` and `schedule`; Z lanes of a cached token, Z' lanes of an output.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.paged_attention.common.partial_softmax import LOWEST, MASKED
from kernels_pallas.paged_attention.tpu.schedule import KernelShape, Scalars, Span, page_range, span_of
from kernels_pallas.pallas import pl, pltpu


class Refs(NamedTuple):
    """Operands, outputs and scratch of one program.

    Attributes:
        q: queries [1, K, Q, query lanes], zero in lanes that hold values.
        new: keys and values of the block's tokens, [1, K, W, Z].
        sinks: attention sinks, f32[K, Q, 1], or None.
        o: outputs [1, K, Q, Z'].
        pages: the cache's pages of all layers, [L * P, K, S, Z].
        keys: the two buffers, [2, pages per buffer, K, S, Z].
        stage: new tokens aligned to the pages' tiles, [K, tokens, Z].
        row_max, row_sum: running maximum and sum of weights, f32[K, Q, 128].
        out: weighted values, f32[K, Q, Z'].
        fetched: DMA semaphores of the two buffers.
        written: DMA semaphore of the writes.
        slot: i32[1], the buffer that the next row starts with.
    """

    q: Any
    new: Any
    sinks: Any
    o: Any
    pages: Any
    keys: Any
    stage: Any
    row_max: Any
    row_sum: Any
    out: Any
    fetched: Any
    written: Any
    slot: Any


class AttentionKernel:
    """One program of the kernel. Every call needs a new instance: JAX reuses the trace of a function it has seen."""

    def __init__(self, shape: KernelShape, scalars: Scalars, refs: Refs) -> None:
        self._shape = shape
        self._scalars = scalars
        self._refs = refs

    def run(self) -> None:
        """Attend the block of this program; the axes of the grid are cores and each core's blocks."""
        block = self._shape.cores.block(pl.program_id(0), pl.program_id(1))
        if self._shape.fused_write:
            # Every core has a program, even if there are fewer rows.
            pl.when(block < self._scalars.block_rows_2C[1, 0])(lambda: self._run_row(block))
            return
        self._reset()
        first, end = self._scalars.block_rows_2C[0, block], self._scalars.block_rows_2C[1, block]
        lax.fori_loop(first, end, lambda row, _: self._attend_row(block, row), None)
        self._finish()

    def _run_row(self, row: jax.Array) -> None:
        self._reset()
        pl.when(pl.program_id(1) == 0)(lambda: self._fetch_first(row))
        self._attend_row(row, row)
        self._finish()

    def _reset(self) -> None:
        refs = self._refs
        shape = refs.row_max.shape
        row_max = refs.sinks[...] if refs.sinks is not None else MASKED
        refs.row_max[...] = jnp.broadcast_to(jnp.float32(row_max), shape)
        refs.row_sum[...] = jnp.ones(shape, jnp.float32)
        refs.out[...] = jnp.zeros(refs.out.shape, jnp.float32)

    def _finish(self) -> None:
        refs = self._refs
        for head in range(self._shape.config.num_kv_heads):
            refs.o[0, head] = (refs.out[head] / refs.row_sum[head, :, :1]).astype(refs.o.dtype)

    # Copies.

    def _page(self, row: jax.Array, index: jax.Array) -> jax.Array:
        entry = row * self._shape.num_table_entries + index
        return self._scalars.first_page_1[0] + self._scalars.page_table_F[entry]

    def _paged(self, page: jax.Array, *tokens: Any) -> Any:
        """Return the part of a page, of the core's heads, that this program reads or writes."""
        num_heads = self._shape.config.num_kv_heads
        heads = pl.ds(pl.program_id(0) * num_heads, num_heads) if self._shape.cores.of_heads else slice(None)
        return self._refs.pages.at[page, heads, *tokens]

    def _for_pages(self, span: Span, buffer: jax.Array, slot: jax.Array, act: Callable[[Any], None]) -> None:
        """Apply `act` (start or wait) to the copy of each page of a buffer."""
        refs = self._refs
        first, end = page_range(self._shape, span, buffer)

        def body(index: jax.Array, _: None) -> None:
            place = refs.keys.at[slot, index - buffer * self._shape.pages_per_buffer]
            act(pltpu.make_async_copy(self._paged(self._page(span.row, index)), place, refs.fetched.at[slot]))

        lax.fori_loop(first, end, body, None)

    def _fetch_first(self, row: jax.Array) -> None:
        """Start fetching the first buffer of the core's first row."""
        self._refs.slot[0] = jnp.int32(0)
        span = span_of(self._shape, self._scalars, row, row)
        self._for_pages(span, span.lowest // self._shape.buffer_tokens, jnp.int32(0), lambda copy: copy.start())

    def _fetch_next_row(self, block: jax.Array, slot: jax.Array) -> None:
        following = block + self._shape.cores.stride

        @pl.when(following < self._scalars.block_rows_2C[1, 0])
        def _() -> None:
            span = span_of(self._shape, self._scalars, following, following)
            self._for_pages(span, span.lowest // self._shape.buffer_tokens, slot, lambda copy: copy.start())

    # One row.

    def _attend_row(self, block: jax.Array, row: jax.Array) -> None:
        shape, refs = self._shape, self._refs
        span = span_of(shape, self._scalars, block, row)
        first, end = span.lowest // shape.buffer_tokens, pl.cdiv(span.end, shape.buffer_tokens)
        # The first buffer with tokens that this program writes.
        written = span.start // shape.buffer_tokens
        if shape.fused_write:
            first_slot = refs.slot[0]
        else:
            first_slot = jnp.int32(0)
            self._write_span(span)
            pl.when(first == written)(lambda: self._for_tiles(span, lambda copy: copy.wait()))
            self._for_pages(span, first, first_slot, lambda copy: copy.start())

        def body(buffer: jax.Array, slot: jax.Array) -> jax.Array:
            @pl.when(buffer + 1 < end)
            def _() -> None:
                if not shape.fused_write:
                    pl.when(buffer + 1 == written)(lambda: self._for_tiles(span, lambda copy: copy.wait()))
                self._for_pages(span, buffer + 1, 1 - slot, lambda copy: copy.start())

            if shape.fused_write:
                pl.when(buffer + 1 == end)(lambda: self._fetch_next_row(block, 1 - slot))
            self._for_pages(span, buffer, slot, lambda copy: copy.wait())
            if shape.fused_write:
                pl.when(buffer + 1 == end)(lambda: self._blend_token(span, buffer, slot))
            self._attend_buffer(block, span, buffer, slot)
            return 1 - slot

        slot = lax.fori_loop(first, end, body, first_slot)
        if shape.fused_write:
            refs.slot[0] = slot
            self._token_copy(span).wait()

    # The new token of a row that runs one token.

    def _token_copy(self, span: Span) -> Any:
        """Return the copy of the tile with the new token to its page."""
        shape, refs = self._shape, self._refs
        position, sublanes = span.end - 1, shape.layout.sublanes
        tile = pl.ds(pl.multiple_of(self._tile_start(position), sublanes), sublanes)
        page = self._page(span.row, position // shape.config.page_size)
        return pltpu.make_async_copy(refs.stage.at[:, pl.ds(0, sublanes)], self._paged(page, tile), refs.written)

    def _tile_start(self, position: jax.Array) -> jax.Array:
        """Return the offset in its page of the tile that contains a position."""
        sublanes = self._shape.layout.sublanes
        return position % self._shape.config.page_size // sublanes * sublanes

    def _blend_token(self, span: Span, buffer: jax.Array, slot: jax.Array) -> None:
        shape, refs = self._shape, self._refs
        position = span.end - 1
        sublanes = shape.layout.sublanes
        index = position // shape.config.page_size - buffer * shape.pages_per_buffer
        tile = pl.ds(pl.multiple_of(self._tile_start(position), sublanes), sublanes)
        is_new_S1 = lax.broadcasted_iota(jnp.int32, (sublanes, 1), 0) == position % sublanes
        for head in range(shape.config.num_kv_heads):
            # Select in f32, to which the conversion is exact: chips without vectors of the cache's dtype cannot select
            # in that dtype.
            old_SZ = refs.keys[slot, index, head, tile].astype(jnp.float32)
            new_1Z = refs.new[0, head].astype(jnp.float32)
            tile_SZ = jnp.where(is_new_S1, new_1Z, old_SZ).astype(refs.keys.dtype)
            refs.keys[slot, index, head, tile] = tile_SZ
            # Attention may clear tokens of the buffer that stay in the page.
            refs.stage[head, :sublanes] = tile_SZ
        self._token_copy(span).start()

    # New tokens of a block.

    def _tile_copy(self, span: Span, index: jax.Array, *, back: bool = False) -> Any:
        """Return the copy of the `index`-th tile with tokens of a span, to its page or back from it."""
        shape, refs = self._shape, self._refs
        sublanes = shape.layout.sublanes
        position = span.start // sublanes * sublanes + index * sublanes
        page = self._page(span.row, position // shape.config.page_size)
        staged = refs.stage.at[:, pl.ds(pl.multiple_of(index * sublanes, sublanes), sublanes)]
        paged = self._paged(page, pl.ds(pl.multiple_of(self._tile_start(position), sublanes), sublanes))
        source, target = (paged, staged) if back else (staged, paged)
        return pltpu.make_async_copy(source, target, refs.written)

    def _for_tiles(self, span: Span, act: Callable[[Any], None]) -> None:
        """Apply `act` (start or wait) to the copies of all tiles."""
        sublanes = self._shape.layout.sublanes
        count = pl.cdiv(span.end, sublanes) - span.start // sublanes
        lax.fori_loop(0, count, lambda index, _: act(self._tile_copy(span, index)), None)

    def _write_span(self, span: Span) -> None:
        """Start writing a span's keys and values.

        The last tile may hold anything past the span's end: those slots of the page are not in use yet.
        """
        shape, refs = self._shape, self._refs
        sublanes, tokens = shape.layout.sublanes, shape.stage_tokens
        shift = span.start % sublanes

        @pl.when(shift > 0)
        def _() -> None:
            copy = self._tile_copy(span, jnp.int32(0), back=True)
            copy.start()
            copy.wait()

        # From the token's offset in the block to its offset in the tiles.
        roll = lax.rem(shift - span.token + tokens, tokens)
        is_new_S1 = lax.broadcasted_iota(jnp.int32, (tokens, 1), 0) >= shift
        padding = jnp.zeros((tokens - shape.block_tokens, shape.layout.lanes), jnp.float32)
        for head in range(shape.config.num_kv_heads):
            new_SZ = jnp.concatenate([refs.new[0, head].astype(jnp.float32), padding])
            old_SZ = refs.stage[head].astype(jnp.float32)
            staged_SZ = jnp.where(is_new_S1, pltpu.roll(new_SZ, roll, 0), old_SZ)
            refs.stage[head] = staged_SZ.astype(refs.stage.dtype)
        self._for_tiles(span, lambda copy: copy.start())

    # Attention.

    def _attend_buffer(self, block: jax.Array, span: Span, buffer: jax.Array, slot: jax.Array) -> None:
        shape = self._shape
        first_position = buffer * shape.buffer_tokens
        is_full = (first_position >= span.lowest) & (first_position + shape.buffer_tokens <= span.end)
        pl.when(~is_full)(lambda: self._clear_dead(span, first_position, slot))
        sees_QE = self._sees(span, first_position)
        for head in range(shape.config.num_kv_heads):
            keys_EZ = self._refs.keys[slot, :, head].reshape(shape.buffer_tokens, shape.layout.lanes)
            self._attend_head(head, keys_EZ, sees_QE)

    def _clear_dead(self, span: Span, first_position: jax.Array, slot: jax.Array) -> None:
        """Put zeros in the slots of a buffer whose tokens the span does not see.

        They may hold NaN, and a weight of 0 times NaN is NaN. Only a row's first and last buffer have any.
        """
        page_size, keys = self._shape.config.page_size, self._refs.keys

        def clear(page: jax.Array, _: None) -> None:
            first = first_position + page * page_size
            is_dead = (first + page_size <= span.lowest) | (first >= span.end)
            is_full = (first >= span.lowest) & (first + page_size <= span.end)

            @pl.when(is_dead)
            def _() -> None:
                keys[slot, page] = jnp.zeros(keys.shape[2:], keys.dtype)

            @pl.when(~is_dead & ~is_full)
            def _() -> None:
                position_S1 = first + lax.broadcasted_iota(jnp.int32, (page_size, 1), 0)
                sees_S1 = (position_S1 >= span.lowest) & (position_S1 < span.end)
                for head in range(self._shape.config.num_kv_heads):
                    # Chips without vectors of the cache's dtype cannot select in that dtype.
                    page_SZ = keys[slot, page, head].astype(jnp.float32)
                    keys[slot, page, head] = jnp.where(sees_S1, page_SZ, 0).astype(keys.dtype)

        lax.fori_loop(0, self._shape.pages_per_buffer, clear, None)

    def _sees(self, span: Span, first_position: jax.Array) -> jax.Array:
        """Return which keys of a buffer each query row sees, bool[Q or 1, E]."""
        shape = self._shape
        key_1E = first_position + lax.broadcasted_iota(jnp.int32, (1, shape.buffer_tokens), 1)
        if shape.fused_write:
            return (key_1E >= span.lowest) & (key_1E < span.end)
        row_Q1 = lax.broadcasted_iota(jnp.int32, (shape.block_rows, 1), 0).astype(jnp.float32)
        # Integer vectors have no division. The floor is exact: the quotient is at least 0.5 / G away from an integer.
        token_Q1 = jnp.floor((row_Q1 + 0.5) * (1 / shape.group)).astype(jnp.int32)
        query_Q1 = span.start - span.token + token_Q1
        mine_Q1 = (query_Q1 >= span.start) & (query_Q1 < span.end)
        sees_QE = mine_Q1 & (key_1E <= query_Q1)
        if shape.config.window is not None:
            sees_QE &= key_1E > query_Q1 - shape.config.window
        return sees_QE

    def _attend_head(self, head: int, keys_EZ: jax.Array, sees_QE: jax.Array) -> None:
        """Merge a buffer's keys into the softmax of one head's queries.

        The MXU takes 8-bit keys and values with bf16 queries and weights; converting them takes longer than that.
        """
        config, layout, refs = self._shape.config, self._shape.layout, self._refs
        q_QZ = refs.q[0, head]
        precision = lax.Precision.HIGHEST if q_QZ.dtype == jnp.float32 else None
        dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32, precision=precision)
        scores_QE = dot(q_QZ, layout.keys(keys_EZ), (((1,), (1,)), ((), ()))) * config.scale
        if config.soft_cap is not None:
            scores_QE = config.soft_cap * jnp.tanh(scores_QE / config.soft_cap)
        scores_QE = jnp.where(sees_QE, scores_QE, MASKED)
        values_EZ = layout.values(keys_EZ)

        old_max_Q1 = refs.row_max[head, :, :1]
        max_Q1 = jnp.maximum(old_max_Q1, jnp.max(scores_QE, axis=1, keepdims=True))
        weights_QE = jnp.exp(scores_QE - jnp.maximum(max_Q1, LOWEST))
        keep_Q1 = jnp.exp(old_max_Q1 - max_Q1)
        sum_Q1 = refs.row_sum[head, :, :1] * keep_Q1 + jnp.sum(weights_QE, axis=1, keepdims=True)
        out_QZ = dot(weights_QE.astype(q_QZ.dtype), values_EZ, (((1,), (0,)), ((), ())))
        refs.row_max[head] = jnp.broadcast_to(max_Q1, refs.row_max.shape[1:])
        refs.row_sum[head] = jnp.broadcast_to(sum_Q1, refs.row_sum.shape[1:])
        refs.out[head] = refs.out[head] * keep_Q1 + out_QZ
