"""Compute warpgroups: online softmax over blocks of keys as they arrive, with the state in registers.

Scores are in base 2, for the hardware's exponential (exp2). Dimension key: m query rows of the warpgroup (64),
s keys of a block, H head dim, h a part of it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.paged_attention.api import AttentionConfig
from kernels_pallas.paged_attention.common.partial_softmax import LOWEST, MASKED
from kernels_pallas.paged_attention.gpu.stream import LiveKeys, Stages
from kernels_pallas.paged_attention.gpu.tile import Tile
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.warpgroup import MATRIX, ROWS, WARPGROUP_ROWS, arrive_and_wait, broadcast_rows, product, smem

LOG2E = math.log2(math.e)


# Columns that fit in registers next to the softmax state.
_PIECE_WIDTH = 64


class Softmax(NamedTuple):
    """A softmax in progress: running maximum and sum of weights [m], weighted values in parts [m, h]."""

    row_max: jax.Array
    row_sum: jax.Array
    out: tuple[jax.Array, ...]


class Converted(NamedTuple):
    """Keys and values of a step, converted to bf16 [s, H], and the barriers of the warpgroups that share them.

    `values` is None where values are part of the keys.
    """

    keys: Any
    values: Any
    written: Any
    read: Any


class Workspace(NamedTuple):
    """The memory, columns and barriers of a compute warpgroup.

    Attributes:
        warpgroup: its index, which is known at trace time where warpgroups share rows.
        parts: its columns of the values, from `Tile.parts`.
        queries: [m, H] in shared memory.
        stages: pipeline stages of the keys and values.
        weights: [m, s] in shared memory for the interpreter, else None.
        values_zeroed: barrier of the warpgroups after `_zero_dead_values`; None for a single warpgroup.
        converted: bf16 keys and values of an 8-bit cache, else None.
    """

    warpgroup: jax.Array | int
    parts: list[slice]
    queries: Any
    stages: Stages
    weights: Any
    values_zeroed: Any
    converted: Converted | None


class Block(NamedTuple):
    """A block of keys and values.

    Attributes:
        slot: stage that holds the block, or will hold it once copied.
        live: its live keys.
        mask: sets scores to `MASKED` where a query does not see a key.
        keys_read: called once the keys of the slot are no longer needed.
        values_read: called once the values of the slot are no longer needed.
    """

    slot: jax.Array
    live: LiveKeys
    mask: Callable[[jax.Array], jax.Array]
    keys_read: Callable[[], None]
    values_read: Callable[[], None]


def row_iota() -> jax.Array:
    """Return the indices 0..63 of the query rows, [m]."""
    return plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=ROWS)


def key_iota(keys: int) -> jax.Array:
    """Return the index of each score's key within the block, [m, s]."""
    return plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS, keys), 1, layout=MATRIX)


def converted_types(tile: Tile, config: AttentionConfig, written: Any = None, read: Any = None) -> Converted | None:
    """Return the scratch types of `Converted`, or None for a cache that needs no conversion."""
    if jnp.dtype(config.dtype).itemsize > 1:
        return None
    step = smem((tile.keys, config.head_dim), jnp.bfloat16)
    return Converted(step, step if config.value_dim is None else None, written, read)


def empty_softmax(tile: Tile, parts: list[slice]) -> Softmax:
    """Return the state before any key."""

    def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    rows = (WARPGROUP_ROWS,)
    out = tuple(full((WARPGROUP_ROWS, tile.width), 0, MATRIX) for _ in parts)
    return Softmax(full(rows, MASKED, ROWS), full(rows, 0, ROWS), out)


def attend_block(config: AttentionConfig, tile: Tile, work: Workspace, block: Block, state: Softmax) -> Softmax:
    """Add a block of keys and values to the softmax `state`."""
    stages, slot = work.stages, block.slot
    if work.converted is None:
        keys = stages.keys.at[slot]
        values = keys if stages.values is None else stages.values.at[slot]
        plgpu.barrier_wait(stages.keys_ready.at[slot])
        if stages.values is None:
            _zero_dead_values(tile, work, values, block.live)
    else:
        keys = work.converted.keys
        values = keys if work.converted.values is None else work.converted.values
        _convert(tile, work, block)
        block.keys_read()
        block.values_read()
    scores_ms = product(work.queries, keys.T, tile.keys)
    if work.converted is None:
        block.keys_read()
    scores_ms = block.mask(_logits(config, scores_ms))
    max_m = jnp.maximum(state.row_max, jnp.max(scores_ms, axis=1))
    weights_ms = jnp.exp2(scores_ms - broadcast_rows(jnp.maximum(max_m, LOWEST), tile.keys))
    old_m = jnp.exp2(state.row_max - max_m)
    sum_m = state.row_sum * old_m + jnp.sum(weights_ms, axis=1)
    if work.converted is None and stages.values is not None:
        plgpu.barrier_wait(stages.values_ready.at[slot])
        _zero_dead_values(tile, work, values, block.live)
    out = _weigh(tile, work, weights_ms.astype(jnp.bfloat16), values, old_m, state.out)
    if work.converted is None:
        block.values_read()
    elif tile.warpgroups > 1:
        arrive_and_wait(work.converted.read)
    return Softmax(max_m, sum_m, out)


def _weigh(
    tile: Tile, work: Workspace, weights_ms: jax.Array, values: Any, old_m: jax.Array, out: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Rescale the weighted values so far by `old_m`, and add those of a block."""
    if work.weights is not None:
        work.weights[...] = weights_ms
        plgpu.commit_smem()
    products = []
    for part, out_mh in zip(work.parts, out, strict=True):
        shrunk_mh = out_mh * broadcast_rows(old_m, tile.width)
        if work.weights is None:
            multiply = partial(_multiply, left=weights_ms, right=values.at[:, part])
            products.append(pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(shrunk_mh)))
        else:
            # The interpreter supports only operands in shared memory and accumulators that start at 0.
            products.append(shrunk_mh + product(work.weights, values.at[:, part], tile.width))
    return tuple(products)


def _multiply(accumulator: Any, left: Any, right: Any) -> None:
    plgpu.wgmma(accumulator, left, right)


def _logits(config: AttentionConfig, scores_ms: jax.Array) -> jax.Array:
    """Return scaled and capped scores in base 2."""
    cap = config.soft_cap
    if cap is None:
        return scores_ms * (config.scale * LOG2E)
    # tanh is computed from an exponential: the hardware's tanh has an error of up to 5e-4, times the cap.
    return cap * LOG2E - 2 * cap * LOG2E / (jnp.exp2(scores_ms * (2 * LOG2E * config.scale / cap)) + 1)


def _zero_dead_values(tile: Tile, work: Workspace, values: Any, live: LiveKeys) -> None:
    """Zero the values of slots without a key, since 0 * NaN is NaN; only the block with the row's end has any."""

    @pl.when(live.end < tile.keys)
    def _ends_within() -> None:
        def zero() -> None:
            for start, rows, columns in _pieces(tile, values.shape[-1]):
                piece = values.at[rows, columns]
                piece[...] = _live_rows(plgpu.load(piece, layout=MATRIX), live, start)
            plgpu.commit_smem()

        _by_warpgroup(tile, work, 0, zero)
        if tile.warpgroups > 1:
            arrive_and_wait(work.values_zeroed)


def _pieces(tile: Tile, head_dim: int) -> list[tuple[int, slice, slice]]:
    """Return (first key, keys, columns) of parts of a block that fit in registers next to the softmax state."""
    width = _PIECE_WIDTH if head_dim % _PIECE_WIDTH == 0 else head_dim
    return [
        (start, slice(start, start + WARPGROUP_ROWS), slice(column, column + width))
        for column in range(0, head_dim, width)
        for start in range(0, tile.keys, WARPGROUP_ROWS)
    ]


def _by_warpgroup(tile: Tile, work: Workspace, warpgroup: int, task: Callable[[], None]) -> None:
    """Run a task in one of the warpgroups."""
    if tile.warpgroups == 1:
        task()
    else:
        pl.when(work.warpgroup == warpgroup)(task)


def _live_rows(x_sH: jax.Array, live: LiveKeys, start: int) -> jax.Array:
    """Zero the rows of keys that are not live; the first row is key `start` of the block."""
    number = plgpu.broadcasted_iota(jnp.int32, x_sH.shape, 0, layout=MATRIX)
    return jnp.where((number >= live.first - start) & (number < live.end - start), x_sH, jnp.zeros_like(x_sH))


def _convert(tile: Tile, work: Workspace, block: Block) -> None:
    """Convert the block's keys and values to bf16.

    With two warpgroups, one converts the keys and one the values, or each converts half of keys that contain values.
    """
    assert work.converted is not None
    slot = block.slot
    stages, converted = work.stages, work.converted

    def convert(source: Any, target: Any, live: LiveKeys | None, share: slice = slice(None)) -> None:
        for start, rows, columns in _pieces(tile, target.shape[-1])[share]:
            x_sH = plgpu.load(source.at[slot, rows, columns], layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
            if jnp.issubdtype(x_sH.dtype, jnp.floating):
                # Hopper has no instruction from fp8 to bf16, so convert through f32; both steps are exact.
                x_sH = x_sH.astype(jnp.float32)
            x_sH = plgpu.layout_cast(x_sH.astype(jnp.bfloat16), MATRIX)
            target.at[rows, columns][...] = x_sH if live is None else _live_rows(x_sH, live, start)

    plgpu.barrier_wait(stages.keys_ready.at[slot])
    if stages.values is None:
        for index in range(tile.warpgroups):
            share = slice(index, None, tile.warpgroups)
            _by_warpgroup(tile, work, index, partial(convert, stages.keys, converted.keys, block.live, share))
    else:
        plgpu.barrier_wait(stages.values_ready.at[slot])
        _by_warpgroup(tile, work, 0, lambda: convert(stages.keys, converted.keys, None))
        _by_warpgroup(tile, work, tile.warpgroups - 1, lambda: convert(stages.values, converted.values, block.live))
    plgpu.commit_smem()
    if tile.warpgroups > 1:
        arrive_and_wait(converted.written)
