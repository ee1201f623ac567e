"""Attention of rows that run several tokens, in tiles of consecutive packed tokens of one or more rows.

Dimension key: T packed tokens, B rows, M pages per row, K key/value heads, G query heads of each (padded to a power
of two), H head dim, V channels of a value, S page size, P pages of all layers, Q tiles, W bands of 64 rows of a tile,
m rows of a band, which are (token, query head) pairs in token-major order, t tokens of a tile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.paged_attention.api import AttentionConfig, AttentionMeta
from kernels_pallas.paged_attention.common.partial_softmax import MASKED
from kernels_pallas.paged_attention.common.token_blocks import rows_of_blocks
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
    row_iota,
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
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.warpgroup import WARPGROUP_ROWS, arrive_and_wait, broadcast_rows, smem

# Registers per thread with two compute warpgroups; the sum over all three warpgroups may not exceed 3 * 168.
_COMPUTE_REGISTERS, _MEMORY_REGISTERS = 240, 24

State = TypeVar("State")


class QueryTiles(NamedTuple):
    """The rows `[first, last]` of each tile that run several tokens; `first > last` if there are none."""

    first_row_Q: jax.Array
    last_row_Q: jax.Array


class PrefillInputs(NamedTuple):
    """Operands of the kernel, in order.

    Attributes:
        layer_1: i32, index of the layer.
        kv_lens_B, page_table_BM, cu_q_lens_B1: see `AttentionMeta`.
        tiles: see `QueryTiles`.
        sinks_KWm: f32 attention sinks in base 2, or None.
        q_QKWmH: bf16 queries.
        keys_PKSH, values_PKSH: pages of all layers; `values_PKSH` is None where values are part of the keys.
    """

    layer_1: Any
    kv_lens_B: Any
    page_table_BM: Any
    cu_q_lens_B1: Any
    tiles: QueryTiles
    sinks_KWm: Any
    q_QKWmH: Any
    keys_PKSH: Any
    values_PKSH: Any


class _Scratch(NamedTuple):
    queries: Any
    queries_ready: Any
    stages: Any
    keys_free: Any
    values_free: Any
    weights: Any
    together: Any
    converted: Any


class _Problem(NamedTuple):
    """Static parameters of the kernel."""

    config: AttentionConfig
    tile: Tile
    tokens: int
    group: int


class _RowShare(NamedTuple):
    """A row's part of a tile: its tokens `[start, end)`, the `shift` from tokens to positions, and its keys."""

    start: jax.Array
    end: jax.Array
    shift: jax.Array
    kv_len: jax.Array
    blocks: KeyBlocks


class _Position(NamedTuple):
    """The position of a warpgroup in its loop: a block of a row's keys, and the number of steps before it."""

    row: jax.Array
    block: jax.Array
    step: jax.Array
    share: _RowShare


def padded_group(num_q_heads: int, num_kv_heads: int) -> int:
    """Return the query heads per key head, rounded up to a power of two, which divides a tile's rows."""
    group = num_q_heads // num_kv_heads
    if group > WARPGROUP_ROWS:
        raise NotImplementedError(f"{group} query heads per key head: at most {WARPGROUP_ROWS} are supported")
    return 1 << (group - 1).bit_length()


def plan_tiles(meta: AttentionMeta, tokens: int) -> QueryTiles:
    """Find the rows of each tile of `tokens` packed tokens."""
    first_Q, end_Q = rows_of_blocks(meta, tokens, meta.distribution_2[0])
    return QueryTiles(first_Q, end_Q - 1)


def attend_prefill(
    config: AttentionConfig,
    tile: Tile,
    q_TNH: jax.Array,
    layer: GpuLayer,
    tiles: QueryTiles,
    interpret: Any = False,
) -> jax.Array:
    """Attend the rows of the tiles.

    Returns:
        o_TNH in bf16; 0 for tokens of other rows and for padding tokens.
    """
    num_tokens, num_heads, head_dim = q_TNH.shape
    num_kv_heads, meta = layer.num_kv_heads, layer.meta
    group = padded_group(num_heads, num_kv_heads)
    tokens = tile.rows // group
    problem = _Problem(config, tile, tokens, group)
    inputs = PrefillInputs(
        layer_1=layer.number[None],
        kv_lens_B=meta.kv_lens_B,
        page_table_BM=meta.page_table_BM,
        cu_q_lens_B1=meta.cu_q_lens_B1,
        tiles=tiles,
        sinks_KWm=None if layer.sinks_N is None else _tile_sinks(layer.sinks_N, num_kv_heads, problem),
        q_QKWmH=_tile_queries(q_TNH.astype(jnp.bfloat16), num_kv_heads, problem),
        keys_PKSH=layer.keys_PKSH,
        values_PKSH=layer.values_PKSH,
    )
    # Every call needs a new function: a function that is reused with another grid keeps its first trace.
    kernel = plgpu.kernel(
        partial(_kernel, problem=problem),
        out_type=jax.ShapeDtypeStruct(inputs.q_QKWmH.shape, jnp.bfloat16),
        scratch_types=[_scratch_types(tile, config)],
        grid=(num_kv_heads, inputs.q_QKWmH.shape[0]),
        grid_names=("head", "tile"),
        num_threads=tile.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="paged_prefill",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    o_QKtGH = kernel(inputs).reshape(-1, num_kv_heads, tokens, group, head_dim)
    o_QKtGV = o_QKtGH[..., : num_heads // num_kv_heads, : config.out_dim]
    return jnp.swapaxes(o_QKtGV, 1, 2).reshape(-1, num_heads, config.out_dim)[:num_tokens]


def _tile_queries(q_TNH: jax.Array, num_kv_heads: int, problem: _Problem) -> jax.Array:
    num_tokens, num_heads, head_dim = q_TNH.shape
    group = num_heads // num_kv_heads
    q_TKGH = q_TNH.reshape(num_tokens, num_kv_heads, group, head_dim)
    q_TKGH = jnp.pad(q_TKGH, ((0, -num_tokens % problem.tokens), (0, 0), (0, problem.group - group), (0, 0)))
    q_QtKGH = q_TKGH.reshape(-1, problem.tokens, num_kv_heads, problem.group, head_dim)
    shape = (-1, num_kv_heads, problem.tile.bands, WARPGROUP_ROWS, head_dim)
    return jnp.swapaxes(q_QtKGH, 1, 2).reshape(shape)


def _tile_sinks(sinks_N: jax.Array, num_kv_heads: int, problem: _Problem) -> jax.Array:
    sinks_KG = (sinks_N * LOG2E).reshape(num_kv_heads, -1)
    sinks_KG = jnp.pad(sinks_KG, ((0, 0), (0, problem.group - sinks_KG.shape[1])))
    return jnp.tile(sinks_KG, (1, problem.tokens)).reshape(num_kv_heads, -1, WARPGROUP_ROWS)


def _scratch_types(tile: Tile, config: AttentionConfig) -> _Scratch:
    free = plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages)
    together = plgpu.Barrier(num_arrivals=tile.warpgroups) if tile.warpgroups > 1 else None
    return _Scratch(
        queries=smem((tile.bands, WARPGROUP_ROWS, config.head_dim), jnp.bfloat16),
        queries_ready=plgpu.Barrier(num_barriers=tile.bands),
        stages=stage_types(tile, config),
        keys_free=free,
        values_free=free if config.value_dim is None else None,
        weights=smem((tile.warpgroups, WARPGROUP_ROWS, tile.keys), jnp.bfloat16) if tile.interpretable else None,
        together=together,
        converted=converted_types(tile, config, together, together),
    )


def _kernel(inputs: PrefillInputs, out: Any, scratch: _Scratch, *, problem: _Problem) -> None:
    warpgroups = problem.tile.warpgroups
    warpgroup = lax.axis_index("warpgroup")

    def compute(warpgroup: jax.Array | int) -> None:
        if warpgroups == 2:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        _attend(problem, inputs, out, scratch, _tile_index(), warpgroup)

    if problem.tile.shares_rows:
        # The columns of each warpgroup have to be known at trace time.
        for index in range(warpgroups):
            pl.when(warpgroup == index)(partial(compute, index))
    else:
        pl.when(warpgroup < warpgroups)(partial(compute, warpgroup))

    @pl.when(warpgroup == warpgroups)
    def _move() -> None:
        if warpgroups == 2:
            plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
        _stream(problem, inputs, scratch, _tile_index())


def _tile_index() -> jax.Array:
    """Return the tile of this thread block, in reverse order.

    Tiles of later tokens see more keys; they start first, so that no long tile is left running alone at the end. Each
    warpgroup computes the index itself: a shared value would be spilled, as the kernel starts with few registers.
    """
    return lax.axis_size("tile") - 1 - lax.axis_index("tile")


def _stream(problem: _Problem, inputs: PrefillInputs, scratch: _Scratch, tile: jax.Array) -> None:
    """Run the memory (producer) warpgroup: copy keys and values of the tile's rows in turn, as stages become free."""
    stages, num_stages = Stages(*scratch.stages), problem.tile.stages
    first_page = inputs.layer_1[0] * problem.config.num_pages
    source = Source(lax.axis_index("head"), first_page, inputs.page_table_BM, inputs.keys_PKSH, inputs.values_PKSH)

    cached = [(source.keys_PKSH, stages.keys, stages.keys_ready, scratch.keys_free)]
    if stages.values is not None:
        cached.append((source.values_PKSH, stages.values, stages.values_ready, scratch.values_free))

    def copy(at: _Position, _: None) -> None:
        slot = lax.rem(at.step, num_stages)
        pages = find_pages(source, at.share.blocks, problem.tile, at.block)
        for pages_PKSH, buffer, ready, free in cached:
            pl.when(at.step >= num_stages)(partial(plgpu.barrier_wait, free.at[slot]))
            copy_block(pages_PKSH, source.head, pages, at.block, problem.tile, buffer, ready, slot)

    _walk(problem, inputs, tile, copy, None)


def _walk(
    problem: _Problem, inputs: PrefillInputs, tile: jax.Array, body: Callable[[_Position, State], State], state: State
) -> State:
    """Run `body` on the key blocks of all rows of the tile, in one loop."""
    last_row = inputs.tiles.last_row_Q[tile]
    num_rows = inputs.kv_lens_B.shape[0]

    def share(row: jax.Array) -> _RowShare:
        return _row_share(problem, inputs, tile, jnp.minimum(row, num_rows - 1))

    def advance(carry: tuple[_Position, State]) -> tuple[_Position, State]:
        at, state = carry
        state = body(at, state)
        ended = at.block + 1 >= at.share.blocks.end
        row = at.row + ended.astype(jnp.int32)
        next_share = lax.cond(ended, lambda: share(row), lambda: at.share)
        block = jnp.where(ended, next_share.blocks.first, at.block + 1)
        return _Position(row, block, at.step + 1, next_share), state

    first_row = inputs.tiles.first_row_Q[tile]
    first_share = share(first_row)
    start = _Position(first_row, first_share.blocks.first, jnp.int32(0), first_share)
    return lax.while_loop(lambda carry: carry[0].row <= last_row, advance, (start, state))[1]


def _row_share(problem: _Problem, inputs: PrefillInputs, tile: jax.Array, row: jax.Array) -> _RowShare:
    config = problem.config
    start, end, kv_len = inputs.cu_q_lens_B1[row], inputs.cu_q_lens_B1[row + 1], inputs.kv_lens_B[row]
    shift = kv_len - end
    end_key = jnp.minimum(end, (tile + 1) * problem.tokens) + shift
    first_key = jnp.int32(0)
    if config.window is not None:
        first_key = jnp.maximum(jnp.maximum(start, tile * problem.tokens) + shift + 1 - config.window, 0)
    blocks = blocks_between(row, first_key, end_key, problem.tile, config.page_size)
    return _RowShare(start, end, shift, kv_len, blocks)


def _attend(
    problem: _Problem, inputs: PrefillInputs, out: Any, scratch: _Scratch, tile: jax.Array, warpgroup: jax.Array | int
) -> None:
    """Run a compute warpgroup: attend the keys of the tile's rows in turn, then write the output."""
    config, head, shares_rows = problem.config, lax.axis_index("head"), problem.tile.shares_rows
    band = 0 if shares_rows else warpgroup
    queries = scratch.queries.at[band]
    ready = scratch.queries_ready.at[band]
    if not shares_rows or warpgroup == 0:
        plgpu.copy_gmem_to_smem(inputs.q_QKWmH.at[tile, head, band], queries, ready)
    plgpu.barrier_wait(ready)
    work = Workspace(
        warpgroup=warpgroup,
        parts=problem.tile.parts(config.out_dim, warpgroup),
        queries=queries,
        stages=Stages(*scratch.stages),
        weights=None if scratch.weights is None else scratch.weights.at[warpgroup],
        values_zeroed=scratch.together,
        converted=scratch.converted,
    )

    def attend(at: _Position, state: Softmax) -> Softmax:
        slot = lax.rem(at.step, problem.tile.stages)
        first_key = at.block * problem.tile.keys
        keys_read = partial(plgpu.barrier_arrive, scratch.keys_free.at[slot])
        values_read = keys_read
        if scratch.values_free is None:
            keys_read = _no_op
        else:
            values_read = partial(plgpu.barrier_arrive, scratch.values_free.at[slot])
        block = Block(
            slot=slot,
            live=live_keys(at.share.blocks, at.block, at.share.kv_len, problem.tile, config.page_size),
            mask=partial(_mask, problem, at.share, tile, band, first_key),
            keys_read=keys_read,
            values_read=values_read,
        )
        return attend_block(config, problem.tile, work, block, state)

    state = _walk(problem, inputs, tile, attend, empty_softmax(problem.tile, work.parts))
    sinks_m = None
    if inputs.sinks_KWm is not None:
        sinks_m = plgpu.load(inputs.sinks_KWm.at[head, band], optimized=False)
    if shares_rows:
        # Outputs overwrite the queries once all warpgroups have read them.
        arrive_and_wait(scratch.together)
    _write(work, state, sinks_m)
    if shares_rows:
        arrive_and_wait(scratch.together)
    if not shares_rows or warpgroup == 0:
        plgpu.copy_smem_to_gmem(queries, out.at[tile, head, band])
        plgpu.wait_smem_to_gmem(0)


def _no_op() -> None:
    """Do nothing: keys that contain the values are released with the values."""


def _mask(
    problem: _Problem,
    share: _RowShare,
    tile: jax.Array,
    band: jax.Array | int,
    first_key: jax.Array,
    scores_ms: jax.Array,
) -> jax.Array:
    """Mask keys that a query does not see; blocks that all queries see entirely need no mask."""
    keys, window = problem.tile.keys, problem.config.window
    first_row = band * WARPGROUP_ROWS
    first = tile * problem.tokens + lax.div(first_row, problem.group)
    last = tile * problem.tokens + lax.div(first_row + WARPGROUP_ROWS - 1, problem.group)
    inside = (first >= share.start) & (last < share.end) & (first_key + keys - 1 <= first + share.shift)
    if window is not None:
        inside &= first_key > last + share.shift - window

    def hide(scores_ms: jax.Array) -> jax.Array:
        token_m = tile * problem.tokens + lax.div(row_iota() + first_row, problem.group)
        mine_m = (token_m >= share.start) & (token_m < share.end)
        # Position of each query, which is the last key it sees; tokens of other rows see none.
        position_m = jnp.where(mine_m, token_m + share.shift, -1)
        key_ms = key_iota(keys) + first_key
        live_ms = key_ms <= broadcast_rows(position_m, keys)
        if window is not None:
            live_ms &= key_ms > broadcast_rows(position_m - window, keys)
        return jnp.where(live_ms, scores_ms, MASKED)

    return lax.cond(inside, lambda scores_ms: scores_ms, hide, scores_ms)


def _write(work: Workspace, state: Softmax, sinks_m: jax.Array | None) -> None:
    """Normalise the weighted values and write them over the queries."""
    sum_m, scale_m = state.row_sum, jnp.ones_like(state.row_sum)
    if sinks_m is not None:
        max_m = jnp.maximum(state.row_max, sinks_m)
        scale_m = jnp.exp2(state.row_max - max_m)
        sum_m = sum_m * scale_m + jnp.exp2(sinks_m - max_m)
    # Tokens of decoding rows and padding tokens have no keys.
    scale_m = jnp.where(sum_m > 0, scale_m / sum_m, 0.0)
    for part, out_mh in zip(work.parts, state.out, strict=True):
        work.queries.at[:, part][...] = (out_mh * broadcast_rows(scale_m, out_mh.shape[1])).astype(jnp.bfloat16)
    plgpu.commit_smem()
