"""Attention of rows that run one token.

The query heads of a key head share a tile of 64 rows. A row's keys are split over several thread blocks (split-KV), so
that a few long rows fill the device; the partial results are merged afterwards. Each partial result is normalised;
where values are part of the keys, it is stored in bf16, in the shared memory of the queries.

Dimension key: B rows, M pages per row, K key/value heads, G query heads of each (padded to a multiple of 8), H head
dim, V channels of a value, S page size, P pages of all layers, X splits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.paged_attention.api import AttentionConfig
from kernels_pallas.paged_attention.common.partial_softmax import MASKED
from kernels_pallas.paged_attention.gpu.layer import GpuLayer
from kernels_pallas.paged_attention.gpu.softmax import (
    LOG2E,
    Block,
    Softmax,
    Workspace,
    attend_block,
    converted_types,
    empty_softmax,
    key_iota,
)
from kernels_pallas.paged_attention.gpu.stream import (
    KeyBlocks,
    Source,
    Stages,
    blocks_between,
    copy_block,
    find_pages,
    live_keys,
    page_numbers,
    stage_types,
)
from kernels_pallas.paged_attention.gpu.tile import Tile
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.warpgroup import WARPGROUP_ROWS, arrive_and_wait, broadcast_rows, smem

# Thread blocks per SM to aim for.
_BLOCKS_PER_CORE = 2
_ROW_MULTIPLE = 8


class DecodeInputs(NamedTuple):
    """Operands of the kernel, in order.

    Attributes:
        layer_2: i32, (first page of the layer, number of rows that run one token).
        kv_lens_B, page_table_BM: see `AttentionMeta`.
        q_BKGH: bf16 queries.
        keys_PKSH, values_PKSH: pages of all layers; `values_PKSH` is None where values are part of the keys.
    """

    layer_2: Any
    kv_lens_B: Any
    page_table_BM: Any
    q_BKGH: Any
    keys_PKSH: Any
    values_PKSH: Any


class DecodeOutputs(NamedTuple):
    """Partial softmaxes in base 2: means [B, K, X, G, H], maxima and sums of weights f32[B, K, X, G].

    Rows that are not decoded are undefined, and so are columns past the channels of a value.
    """

    out: Any
    row_max: Any
    row_sum: Any


class _Problem(NamedTuple):
    """Static parameters of the kernel."""

    config: AttentionConfig
    tile: Tile
    splits: int


class _Scratch(NamedTuple):
    queries: Any
    queries_ready: Any
    stages: Any
    free: Any
    together: Any
    weights: Any
    converted: Any
    out: Any
    row_max: Any
    row_sum: Any


def choose_splits(num_rows: int, num_kv_heads: int, num_pages: int, page_size: int, tile: Tile, num_cores: int) -> int:
    """Return the thread blocks per row and key head: enough to fill the device, but none that never has work."""
    wanted = -(-_BLOCKS_PER_CORE * num_cores // (num_rows * num_kv_heads))
    return max(1, min(wanted, -(-num_pages * page_size // tile.keys)))


def decode_bytes(config: AttentionConfig, tile: Tile, splits: int, kv_lens: list[int]) -> int:
    """Return the bytes moved between memory and chip for one layer of a decode step, by the kernel's own schedule.

    Per row: its pages, or the parts of pages that its blocks consist of, once (if a split copies one twice, the second
    copy hits the cache), a query per head and split, and the partial results, which the merge reads.
    """
    problem = _Problem(config, tile, splits)
    itemsize = jnp.dtype(config.dtype).itemsize
    group = -(-config.num_q_heads // config.num_kv_heads // _ROW_MULTIPLE) * _ROW_MULTIPLE
    stretch = min(config.page_size, tile.keys)
    stretches = 0
    for kv_len in kv_lens:
        for split in range(splits):
            blocks = _split_blocks(problem, jnp.int32(0), jnp.int32(kv_len), jnp.int32(split))
            copied: set[tuple[int, int]] = set()
            for index in range(int(blocks.first), int(blocks.end)):
                part = index if config.page_size > tile.keys else 0
                numbers = page_numbers(blocks, tile, config.page_size, jnp.int32(index))
                copied |= {(int(number), part) for number in numbers}
            stretches += len(copied)
    arrays = 2 if config.value_dim is None else 1
    cached = stretches * stretch * arrays * config.num_kv_heads * config.head_dim * itemsize
    heads = len(kv_lens) * config.num_kv_heads * group
    part = config.head_dim * jnp.dtype(_part_dtype(config)).itemsize + 2 * 4
    return cached + heads * splits * (2 * config.head_dim + part)


def attend_decode(
    config: AttentionConfig, tile: Tile, splits: int, q_BNH: jax.Array, layer: GpuLayer, interpret: Any = False
) -> jax.Array:
    """Attend the rows that run one token; they come first, so that row and token have the same index.

    Returns:
        o_BNH in f32; 0 for the other rows.
    """
    num_rows, num_heads, head_dim = q_BNH.shape
    num_kv_heads, num_decode = layer.num_kv_heads, layer.meta.distribution_2[0]
    group = num_heads // num_kv_heads
    if group > WARPGROUP_ROWS:
        raise NotImplementedError(f"{group} query heads per key head: at most {WARPGROUP_ROWS} are supported")
    q_BKGH = q_BNH.reshape(num_rows, num_kv_heads, group, head_dim).astype(jnp.bfloat16)
    q_BKGH = jnp.pad(q_BKGH, ((0, 0), (0, 0), (0, -group % _ROW_MULTIPLE), (0, 0)))
    inputs = DecodeInputs(
        layer_2=jnp.stack([layer.first_page, num_decode]).astype(jnp.int32),
        kv_lens_B=layer.meta.kv_lens_B[:num_rows],
        page_table_BM=layer.meta.page_table_BM[:num_rows],
        q_BKGH=q_BKGH,
        keys_PKSH=layer.keys_PKSH,
        values_PKSH=layer.values_PKSH,
    )
    parts = (num_rows, num_kv_heads, splits, q_BKGH.shape[2])
    stats = jax.ShapeDtypeStruct(parts, jnp.float32)
    # Every call needs a new function: a function that is reused with another grid keeps its first trace.
    kernel = plgpu.kernel(
        partial(_kernel, problem=_Problem(config, tile, splits)),
        out_type=(jax.ShapeDtypeStruct((*parts, head_dim), _part_dtype(config)), stats, stats),
        scratch_types=[_scratch_types(tile, config)],
        grid=(splits, num_kv_heads, num_rows),
        grid_names=("split", "head", "row"),
        num_threads=tile.warpgroups if tile.shares_rows else None,
        thread_name="warpgroup" if tile.shares_rows else None,
        kernel_name="paged_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    outputs = DecodeOutputs(*kernel(inputs))
    o_BKGH = _merge(outputs, None if layer.sinks_N is None else layer.sinks_N.reshape(num_kv_heads, group))
    live_B = jnp.arange(num_rows) < num_decode
    o_BKGV = jnp.where(live_B[:, None, None, None], o_BKGH[:, :, :group, : config.out_dim], 0)
    return o_BKGV.reshape(num_rows, num_heads, config.out_dim)


def _part_dtype(config: AttentionConfig) -> Any:
    return jnp.float32 if config.value_dim is None else jnp.bfloat16


def _scratch_types(tile: Tile, config: AttentionConfig) -> _Scratch:
    rows = plgpu.SMEM((WARPGROUP_ROWS,), jnp.float32)
    together = plgpu.Barrier(num_arrivals=tile.warpgroups) if tile.warpgroups > 1 else None
    return _Scratch(
        queries=smem((WARPGROUP_ROWS, config.head_dim), jnp.bfloat16),
        queries_ready=plgpu.Barrier(),
        stages=stage_types(tile, config),
        free=plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages) if tile.warpgroups > 1 else None,
        together=together,
        weights=smem((tile.warpgroups, WARPGROUP_ROWS, tile.keys), jnp.bfloat16) if tile.interpretable else None,
        converted=converted_types(tile, config, together, together),
        out=smem((WARPGROUP_ROWS, tile.width), jnp.float32) if config.value_dim is None else None,
        row_max=rows,
        row_sum=rows,
    )


def _merge(parts: DecodeOutputs, sinks_KG: jax.Array | None) -> jax.Array:
    """Merge the partial softmaxes of all splits, and return the outputs [B, K, G, H]."""
    max_BKG = jnp.max(parts.row_max, axis=2)
    if sinks_KG is not None:
        sinks_KG = jnp.pad(sinks_KG * LOG2E, ((0, 0), (0, max_BKG.shape[-1] - sinks_KG.shape[-1])))
        max_BKG = jnp.maximum(max_BKG, sinks_KG)
    weight_BKXG = parts.row_sum * jnp.exp2(parts.row_max - max_BKG[:, :, None])
    sum_BKG = jnp.sum(weight_BKXG, axis=2)
    if sinks_KG is not None:
        sum_BKG += jnp.exp2(sinks_KG - max_BKG)
    return jnp.sum(parts.out.astype(jnp.float32) * weight_BKXG[..., None], axis=2) / sum_BKG[..., None]


def _kernel(
    inputs: DecodeInputs, out: Any, row_max: Any, row_sum: Any, scratch: _Scratch, *, problem: _Problem
) -> None:
    outputs = DecodeOutputs(out, row_max, row_sum)
    row = lax.axis_index("row")

    @pl.when(row < inputs.layer_2[1])
    def _live() -> None:
        kv_len = inputs.kv_lens_B[row]
        blocks = _split_blocks(problem, row, kv_len, lax.axis_index("split"))
        if not problem.tile.shares_rows:
            _attend(problem, inputs, outputs, scratch, blocks, 0)
            return
        for warpgroup in range(problem.tile.warpgroups):
            attend = partial(_attend, problem, inputs, outputs, scratch, blocks, warpgroup)
            pl.when(lax.axis_index("warpgroup") == warpgroup)(attend)


def _split_blocks(problem: _Problem, row: jax.Array, kv_len: jax.Array, split: jax.Array) -> KeyBlocks:
    """Return a split's share of the row's blocks, which may be empty."""
    config = problem.config
    first_key = jnp.int32(0) if config.window is None else jnp.maximum(kv_len - config.window, 0)
    blocks = blocks_between(row, first_key, kv_len, problem.tile, config.page_size)
    share = pl.cdiv(blocks.end - blocks.first, problem.splits)
    first = blocks.first + split * share
    return blocks._replace(first=first, end=jnp.minimum(first + share, blocks.end))


def _attend(
    problem: _Problem,
    inputs: DecodeInputs,
    outputs: DecodeOutputs,
    scratch: _Scratch,
    blocks: KeyBlocks,
    warpgroup: int,
) -> None:
    """Attend the blocks and write the partial softmax; the first warpgroup issues all copies."""
    config, tile = problem.config, problem.tile
    head, split, kv_len = lax.axis_index("head"), lax.axis_index("split"), inputs.kv_lens_B[blocks.row]
    group = pl.ds(0, inputs.q_BKGH.shape[2])
    stages = Stages(*scratch.stages)
    source = Source(head, inputs.layer_2[0], inputs.page_table_BM, inputs.keys_PKSH, inputs.values_PKSH)
    # The tile's other rows are undefined: rows of a product are independent, and the results of those are not written.
    if warpgroup == 0:
        plgpu.copy_gmem_to_smem(inputs.q_BKGH.at[blocks.row, head], scratch.queries.at[group], scratch.queries_ready)
        for ahead in range(tile.stages):
            for copy in _copies(tile, source, stages, blocks, blocks.first + ahead, jnp.int32(ahead)):
                copy()
    plgpu.barrier_wait(scratch.queries_ready)
    work = Workspace(
        warpgroup=warpgroup,
        parts=tile.parts(config.out_dim, warpgroup),
        queries=scratch.queries,
        stages=stages,
        weights=None if scratch.weights is None else scratch.weights.at[warpgroup],
        values_zeroed=scratch.together,
        converted=scratch.converted,
    )

    def body(index: jax.Array, state: Softmax) -> Softmax:
        slot = lax.rem(index - blocks.first, tile.stages)
        copies = []
        if warpgroup == 0:
            copies = _copies(tile, source, stages, blocks, index + tile.stages, slot)
        free = None if scratch.free is None else scratch.free.at[slot]
        block = Block(
            slot=slot,
            live=live_keys(blocks, index, kv_len, tile, config.page_size),
            mask=partial(_mask, config, tile, index * tile.keys, kv_len),
            keys_read=partial(_refill, copies[:-1], None),
            values_read=partial(_refill, copies[-1:], free),
        )
        return attend_block(config, tile, work, block, state)

    state = lax.fori_loop(blocks.first, blocks.end, body, empty_softmax(tile, work.parts))
    _write(work, outputs, scratch, state, (blocks.row, head, split), group)


def _refill(copies: list[Callable[[], None]], free: Any) -> None:
    """Start copies into a stage that has been read, by all warpgroups if they have a barrier `free`."""
    if free is not None:
        plgpu.barrier_arrive(free)
        if copies:
            plgpu.barrier_wait(free)
    for copy in copies:
        copy()


def _copies(
    tile: Tile, source: Source, stages: Stages, blocks: KeyBlocks, index: jax.Array, slot: jax.Array
) -> list[Callable[[], None]]:
    """Return functions that copy a block's keys and its separate values, or do nothing if there is no such block."""
    # The pages are looked up now, so that they are known when the copies start.
    pages = find_pages(source, blocks, tile, index)

    def copy(pages_PKSH: Any, buffer: Any, ready: Any) -> None:
        @pl.when(index < blocks.end)
        def _exists() -> None:
            copy_block(pages_PKSH, source.head, pages, index, tile, buffer, ready, slot)

    copies = [partial(copy, source.keys_PKSH, stages.keys, stages.keys_ready)]
    if stages.values is not None:
        copies.append(partial(copy, source.values_PKSH, stages.values, stages.values_ready))
    return copies


def _write(
    work: Workspace,
    outputs: DecodeOutputs,
    scratch: _Scratch,
    state: Softmax,
    part: tuple[jax.Array, ...],
    group: Any,
) -> None:
    """Write the group's rows of the partial softmax to global memory."""
    scale_m = jnp.where(state.row_sum > 0, 1 / state.row_sum, 0.0)
    if scratch.together is not None:
        # Outputs overwrite the queries once all warpgroups have read them.
        arrive_and_wait(scratch.together)
    for columns, out_mh in zip(work.parts, state.out, strict=True):
        buffer = scratch.queries.at[:, columns] if scratch.out is None else scratch.out
        buffer[...] = (out_mh * broadcast_rows(scale_m, out_mh.shape[1])).astype(outputs.out.dtype)
        plgpu.commit_smem()
        if scratch.out is not None:
            plgpu.copy_smem_to_gmem(scratch.out.at[group], outputs.out.at[(*part, slice(None), columns)])
            # The buffer is reused for the next columns.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if scratch.together is not None:
        arrive_and_wait(scratch.together)
    if work.warpgroup == 0:
        if scratch.out is None:
            plgpu.copy_smem_to_gmem(scratch.queries.at[group], outputs.out.at[part])
        scratch.row_max[...], scratch.row_sum[...] = state.row_max, state.row_sum
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.row_max.at[group], outputs.row_max.at[part])
        plgpu.copy_smem_to_gmem(scratch.row_sum.at[group], outputs.row_sum.at[part])
    plgpu.wait_smem_to_gmem(0)


def _mask(
    config: AttentionConfig, tile: Tile, first_key: jax.Array, kv_len: jax.Array, scores_ms: jax.Array
) -> jax.Array:
    """Mask keys past the row's end and before its window; blocks in between need no mask."""
    inside = first_key + tile.keys <= kv_len
    if config.window is not None:
        inside &= first_key >= kv_len - config.window

    def hide(scores_ms: jax.Array) -> jax.Array:
        key_ms = key_iota(tile.keys) + first_key
        live_ms = key_ms < kv_len
        if config.window is not None:
            live_ms &= key_ms >= kv_len - config.window
        return jnp.where(live_ms, scores_ms, MASKED)

    return lax.cond(inside, lambda scores_ms: scores_ms, hide, scores_ms)
