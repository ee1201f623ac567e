"""Attention of rows that run one token.

The query heads of a key head share a tile of 64 rows. A row's keys are split over several thread blocks (split-KV; see
`work`), and their partial results are merged afterwards (`merge`). Each partial result is normalised; where values are
part of the keys, it is stored in bf16, in the shared memory of the queries.

Dimension key: B rows, M pages per row, K key/value heads, G query heads of each (padded to a multiple of 8), H head
dim, V channels of a value, S page size, P pages of all layers, W items of work.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.paged_attention.api import AttentionConfig
from kernels_pallas.paged_attention.common.partial_softmax import MASKED
from kernels_pallas.paged_attention.gpu.layer import GpuLayer
from kernels_pallas.paged_attention.gpu.merge import MergedShape, can_start_at, merge_parts
from kernels_pallas.paged_attention.gpu.softmax import (
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
    stage_types,
)
from kernels_pallas.paged_attention.gpu.tile import Tile
from kernels_pallas.paged_attention.gpu.work import DecodeWork
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.warpgroup import WARPGROUP_ROWS, arrive_and_wait, broadcast_rows, smem

_ROW_MULTIPLE = 8


class DecodeInputs(NamedTuple):
    """Operands of the kernel, in order.

    Attributes:
        layer_1: i32, index of the layer.
        work: the items.
        kv_lens_B, page_table_BM: see `AttentionMeta`.
        q_BXGH: bf16 queries of X blocks: the heads of each key head, padded, or those of a few key heads together.
        keys_PKSH, values_PKSH: pages of all layers; `values_PKSH` is None where values are part of the keys.
    """

    layer_1: Any
    work: Any
    kv_lens_B: Any
    page_table_BM: Any
    q_BXGH: Any
    keys_PKSH: Any
    values_PKSH: Any


class DecodeOutputs(NamedTuple):
    """Partial softmaxes in base 2: means [W, K, G, H], maxima and sums of weights f32[W, K, G].

    Entries past the last item are undefined, and so are columns past the channels of a value.
    """

    out: Any
    row_max: Any
    row_sum: Any


class _Problem(NamedTuple):
    """Static parameters of the kernel."""

    config: AttentionConfig
    tile: Tile


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


def decode_bytes(config: AttentionConfig, tile: Tile, kv_lens: list[int], work: DecodeWork) -> int:
    """Return the bytes moved between memory and chip for one layer of a decode step, by the kernels' own schedule.

    Per item: its pages, or the parts of pages that its blocks consist of (if two items share one, the second copy hits
    the cache, but it counts), a query per head, and a partial result, which is written and read again. Per row: its
    result.
    """
    row_w, first_w, end_w = (np.asarray(each)[: int(work.end_B[-1])] for each in work[:3])
    kv_len_w = np.asarray(kv_lens)[row_w]
    first_key_w = np.zeros_like(kv_len_w) if config.window is None else np.maximum(kv_len_w - config.window, 0)
    pages = tile.keys // config.page_size
    if pages:
        last_w = np.minimum((kv_len_w - 1) // config.page_size, end_w * pages - 1)
        stretches = int(np.sum(last_w - np.maximum(first_key_w // config.page_size, first_w * pages) + 1))
    else:
        stretches = int(np.sum(end_w - first_w))
    itemsize = jnp.dtype(config.dtype).itemsize
    arrays = 2 if config.value_dim is None else 1
    stretch = min(config.page_size, tile.keys)
    cached = stretches * stretch * arrays * config.num_kv_heads * config.head_dim * itemsize
    group = padded_group(config.num_q_heads // config.num_kv_heads)
    part = config.head_dim * jnp.dtype(part_dtype(config)).itemsize + 2 * 4
    parts = len(row_w) * config.num_kv_heads * group * (2 * config.head_dim + 2 * part)
    return cached + parts + len(kv_lens) * config.num_q_heads * config.out_dim * 2


def padded_group(group: int) -> int:
    """Return the query heads of a key head, with padding."""
    return -(-group // _ROW_MULTIPLE) * _ROW_MULTIPLE


def _key_heads_together(num_heads: int, group: int, out_dim: int) -> int:
    """Return the number of key heads whose queries are copied together: more than one where they fill eight rows.

    Their queries are then not padded, which would take a launch. Each key head computes the rows of all of them, as it
    would compute those of padding, and its own are taken from the result.
    """
    together = _ROW_MULTIPLE // group if _ROW_MULTIPLE % group == 0 else 1
    if num_heads % _ROW_MULTIPLE or not can_start_at(group, out_dim):
        return 1
    return together


def attend_decode(
    config: AttentionConfig, tile: Tile, work: DecodeWork, q_BNH: jax.Array, layer: GpuLayer, interpret: Any = False
) -> jax.Array:
    """Attend the rows that run one token; they come first, so that row and token have the same index.

    Returns:
        o_BNH in bf16; 0 for the other rows.
    """
    num_rows, num_heads, head_dim = q_BNH.shape
    num_kv_heads = layer.num_kv_heads
    group = num_heads // num_kv_heads
    if group > WARPGROUP_ROWS:
        raise NotImplementedError(f"{group} query heads per key head: at most {WARPGROUP_ROWS} are supported")
    together = _key_heads_together(num_heads, group, config.out_dim)
    q_BXGH = q_BNH.reshape(num_rows, num_kv_heads // together, group * together, head_dim).astype(jnp.bfloat16)
    q_BXGH = jnp.pad(q_BXGH, ((0, 0), (0, 0), (0, padded_group(group) - group * together), (0, 0)))
    inputs = DecodeInputs(
        layer_1=layer.number[None],
        work=work,
        kv_lens_B=layer.meta.kv_lens_B[:num_rows],
        page_table_BM=layer.meta.page_table_BM[:num_rows],
        q_BXGH=q_BXGH,
        keys_PKSH=layer.keys_PKSH,
        values_PKSH=layer.values_PKSH,
    )
    parts = (work.row_W.shape[0], num_kv_heads, q_BXGH.shape[2])
    stats = jax.ShapeDtypeStruct(parts, jnp.float32)
    # Every call needs a new function: a function that is reused with another grid keeps its first trace.
    kernel = plgpu.kernel(
        partial(_kernel, problem=_Problem(config, tile)),
        out_type=(jax.ShapeDtypeStruct((*parts, head_dim), part_dtype(config)), stats, stats),
        scratch_types=[_scratch_types(tile, config)],
        grid=(num_kv_heads, parts[0]),
        grid_names=("head", "item"),
        num_threads=tile.warpgroups if tile.shares_rows else None,
        thread_name="warpgroup" if tile.shares_rows else None,
        kernel_name="paged_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    outputs = DecodeOutputs(*kernel(inputs))
    sinks_XG = None if layer.sinks_N is None else layer.sinks_N.reshape(q_BXGH.shape[1], -1)
    shape = MergedShape(group, config.out_dim, together)
    o_BKGV = merge_parts(outputs, work.end_B[:num_rows], sinks_XG, shape, interpret)
    return o_BKGV.reshape(num_rows, num_heads, config.out_dim)


def part_dtype(config: AttentionConfig) -> Any:
    """Return the dtype of partial results."""
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


def _kernel(
    inputs: DecodeInputs, out: Any, row_max: Any, row_sum: Any, scratch: _Scratch, *, problem: _Problem
) -> None:
    outputs = DecodeOutputs(out, row_max, row_sum)
    item = lax.axis_index("item")
    work: DecodeWork = inputs.work

    @pl.when(item < work.end_B[work.end_B.shape[0] - 1])
    def _live() -> None:
        row = work.row_W[item]
        blocks = _row_blocks(problem, row, inputs.kv_lens_B[row])
        blocks = blocks._replace(first=work.first_W[item], end=work.end_W[item])
        if not problem.tile.shares_rows:
            _attend(problem, inputs, outputs, scratch, blocks, 0)
            return
        for warpgroup in range(problem.tile.warpgroups):
            attend = partial(_attend, problem, inputs, outputs, scratch, blocks, warpgroup)
            pl.when(lax.axis_index("warpgroup") == warpgroup)(attend)


def _row_blocks(problem: _Problem, row: jax.Array, kv_len: jax.Array) -> KeyBlocks:
    """Return all blocks that a row sees."""
    config = problem.config
    first_key = jnp.int32(0) if config.window is None else jnp.maximum(kv_len - config.window, 0)
    return blocks_between(row, first_key, kv_len, problem.tile, config.page_size)


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
    head, item, kv_len = lax.axis_index("head"), lax.axis_index("item"), inputs.kv_lens_B[blocks.row]
    group = pl.ds(0, inputs.q_BXGH.shape[2])
    block = lax.div(head, inputs.keys_PKSH.shape[1] // inputs.q_BXGH.shape[1])
    stages = Stages(*scratch.stages)
    first_page = inputs.layer_1[0] * config.num_pages
    source = Source(head, first_page, inputs.page_table_BM, inputs.keys_PKSH, inputs.values_PKSH)
    # The tile's other rows are undefined: rows of a product are independent, and the results of those are not written.
    if warpgroup == 0:
        plgpu.copy_gmem_to_smem(inputs.q_BXGH.at[blocks.row, block], scratch.queries.at[group], scratch.queries_ready)
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
    _write(work, outputs, scratch, state, (item, head), group)


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
