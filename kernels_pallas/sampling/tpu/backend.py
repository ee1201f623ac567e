"""One pass over the logits on TPU (Pallas Mosaic).

The grid is groups of eight rows by blocks of the vocabulary. The pipeline copies the blocks to VMEM; the summary of a
group is its output block, which stays in VMEM across them. Bytes per row: 4 V of logits, 4 V of counts if it is
penalised, V / 8 of mask, and 3 to 35 KB of output. All arithmetic is f32 on (8, 128) tiles; nothing moves across lanes.

Dimension key: B rows of logits, V the shard's ids, G groups of 8 rows, J entries of a list, Q words of bit planes, C
blocks.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.pallas import pl, pltpu
from kernels_pallas.sampling.api import MASK_BITS, SampleOutput, SamplingInputs, SamplingMode, SamplingState
from kernels_pallas.sampling.common.adjust import penalise, sparse_lists
from kernels_pallas.sampling.common.buckets import DEPTH, NUM_BUCKETS, Lanes, Noised, best_of, candidates_of, insert
from kernels_pallas.sampling.common.combine import sample_with
from kernels_pallas.sampling.common.planes import bit_planes, mask_words_from, sorted_lists
from kernels_pallas.sampling.common.summary import (
    Best,
    Candidates,
    Shard,
    Summary,
    inverse_temperature,
    penalised,
    plan_sampling,
)
from kernels_pallas.sampling.common.threshold import threshold_search

_LANES = 128
_ROWS = 8
_TILES = NUM_BUCKETS // _LANES
# One word of a bit plane covers 32 tiles.
_BLOCK_UNIT = _LANES * MASK_BITS
# 1 MiB of logits: large enough for an efficient transfer, and the kernel stays below the default VMEM limit.
_MAX_BLOCK = 8 * _BLOCK_UNIT
_ROWS_AT_ONCE = 8

_NOISY, _LISTED, _PENALISED, _ADJUSTED = 1, 2, 4, 8


def sample(
    logits_BV: jax.Array,
    inputs: SamplingInputs,
    state: SamplingState,
    shard: Shard | None = None,
    mode: SamplingMode = SamplingMode.ADJUSTED,
    *,
    block: int,
    interpret: Any = False,
) -> SampleOutput:
    """Sample one token per row of f32 logits, `block` ids at a time; see `combine.sample_with` and `choose_block`."""
    shard = shard or Shard(logits_BV.shape[1])

    def summarise(
        logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState, shard: Shard, mode: SamplingMode
    ) -> Summary:
        # No block is longer than the row.
        units = -(-min(block, logits_BV.shape[1]) // _BLOCK_UNIT)
        kernel = _Kernel(units * _BLOCK_UNIT, shard, interpret)
        adjusting = state if mode == SamplingMode.ADJUSTED else None
        best, candidates = kernel(logits_BV, inputs, adjusting, listed=mode != SamplingMode.PLAIN)
        if candidates is None:
            return Summary(best)
        search = threshold_search(logits_BV, inputs, state, shard, rows_at_once=_ROWS_AT_ONCE)
        return Summary(best, candidates, search)

    return sample_with(summarise, logits_BV, inputs, state, shard, mode)


def choose_block(vmem_bytes: int) -> int:
    """Choose the largest block, in ids, whose logits (twice), values, counts and outputs (twice) fit half of VMEM."""
    kept = 2 * 4 * _ROWS * 2 * DEPTH * NUM_BUCKETS
    fits = (vmem_bytes // 2 - kept) // (4 * 4 * _ROWS)
    return max(1, min(_MAX_BLOCK, fits) // _BLOCK_UNIT) * _BLOCK_UNIT


class _Refs(NamedTuple):
    """Operands and results; None where a variant of the kernel lacks one. R8 is 8 rows, or B if there are fewer."""

    state_row: Any  # SMEM i32[B]
    sample_flags: Any  # SMEM i32[B]
    group_flags: Any  # SMEM i32[G]
    extent: Any  # SMEM i32[2], first id of the shard and number of its ids
    logits: Any  # VMEM f32[R8, block]
    floats: Any  # VMEM f32[R8, 4], inverse temperature, repetition, frequency, presence
    ints: Any  # VMEM i32[R8, 4], seed halves, position, whether masked
    planes: Any  # VMEM i32[R8, block / 32]
    list_ids: Any  # SMEM i32[R8, J]
    list_values: Any  # SMEM f32[R8, J]
    list_begin: Any  # SMEM i32[R8, C + 1]
    counts: Any  # HBM i32[R, V]
    kept_floats: Any  # VMEM f32[R8, 384], maximum, sum, noised maximum
    kept_ids: Any  # VMEM i32[R8, 256], ids of the maximum and of the noised maximum
    level_values: Any  # VMEM f32[R8, DEPTH * 1024]
    level_ids: Any  # VMEM i32[R8, DEPTH * 1024]
    values: Any  # VMEM f32[R8, block], adjusted logits
    row_counts: Any  # VMEM i32[R8, block]
    sems: Any  # DMA[R8]


class _Kernel:
    """The kernel for one block size and one shard."""

    def __init__(self, block: int, shard: Shard, interpret: Any) -> None:
        self._block = block
        self._shard = shard
        self._interpret = interpret

    def __call__(
        self, logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState | None, *, listed: bool
    ) -> tuple[Best, Candidates | None]:
        """Run the kernel; without a state no logits are adjusted."""
        rows, size = logits_BV.shape
        group = min(_ROWS, rows)
        names, operands, in_specs = self._operands(logits_BV, inputs, state, group)
        outs = [("kept_floats", jnp.float32, 3 * _LANES), ("kept_ids", jnp.int32, 2 * _LANES)]
        if listed:
            outs += [("level_values", jnp.float32, DEPTH * NUM_BUCKETS), ("level_ids", jnp.int32, DEPTH * NUM_BUCKETS)]
        scratch: dict[str, Any] = {}
        if state is not None:
            scratch["values"] = pltpu.VMEM((group, self._block), jnp.float32)
            scratch["row_counts"] = pltpu.VMEM((group, self._block), jnp.int32)
            scratch["sems"] = pltpu.SemaphoreType.DMA((group,))
        ref_names = [*names, *(name for name, _, _ in outs), *scratch]
        tail = size if state is None else state.counts_RV.shape[1]
        body = _body(ref_names, self._block, -(-tail // _LANES) * _LANES)
        found = pl.pallas_call(
            body,
            name=f"sample_{'adjusted' if state else 'plain'}_{'listed' if listed else 'best'}",
            out_shape=[jax.ShapeDtypeStruct((rows, width), dtype) for _, dtype, width in outs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=4,
                grid=(-(-rows // group), -(-size // self._block)),
                in_specs=in_specs,
                out_specs=[pl.BlockSpec((group, width), lambda g, v, *_: (g, 0)) for _, _, width in outs],
                scratch_shapes=list(scratch.values()),
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=self._interpret,
        )(*operands)
        return self._finish(found, size)

    def _operands(
        self, logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState | None, group: int
    ) -> tuple[list[str], list[jax.Array], list[Any]]:
        rows, size = logits_BV.shape
        blocks = -(-size // self._block)
        shard = self._shard
        plan = plan_sampling(inputs, shard.vocab_size)
        flags = (
            (plan.noisy_B, _NOISY),
            (plan.listed_B, _LISTED),
            (penalised(inputs), _PENALISED),
            (plan.adjusted_B, _ADJUSTED),
        )
        flag_B = sum((jnp.where(x_B, bit, 0) for x_B, bit in flags), jnp.zeros(rows, jnp.int32))
        flag_B = _pad_rows(flag_B, group)
        flag_G = lax.reduce(flag_B.reshape(-1, group), jnp.int32(0), lax.bitwise_or, (1,))
        first = shard.first(size)
        extent = jnp.stack([first, jnp.minimum(size, shard.vocab_size - first)])
        floats = (inverse_temperature(inputs), inputs.repetition_B, inputs.frequency_B, inputs.presence_B)
        seeds_B2 = lax.bitcast_convert_type(inputs.seed_B2, jnp.int32)
        ints = (seeds_B2[:, 0], seeds_B2[:, 1], inputs.position_B, inputs.masked_B.astype(jnp.int32))

        def by_group(width: int, space: Any = pltpu.VMEM) -> Any:
            return pl.BlockSpec((group, width), lambda g, v, *_: (g, 0), memory_space=space)

        names = ["state_row", "sample_flags", "group_flags", "extent", "logits", "floats", "ints"]
        row_B = inputs.row_B
        specs = [pl.BlockSpec((group, self._block), lambda g, v, *_: (g, v)), by_group(4), by_group(4)]
        late: list[jax.Array] = []
        if state is not None:
            counts_RV = state.counts_RV
            if size % _LANES:
                # A DMA cannot slice these rows from the array, because they end inside a tile.
                counts_RV = jnp.pad(counts_RV[row_B], ((0, 0), (0, -size % _LANES)))
                row_B = jnp.arange(rows, dtype=jnp.int32)
            words_BW = mask_words_from(inputs.mask_BW, first, blocks * self._block // MASK_BITS)
            planes_BQP = bit_planes(words_BW.reshape(rows, -1, _LANES // MASK_BITS))
            lists = sorted_lists(*sparse_lists(inputs, state, shard, size), self._block, blocks)
            names += ["planes", "list_ids", "list_values", "list_begin", "counts"]
            late = [planes_BQP.reshape(rows, -1), *(_pad_rows(x, group) for x in lists), counts_RV]
            specs.append(pl.BlockSpec((group, self._block // MASK_BITS), lambda g, v, *_: (g, v)))
            specs += [by_group(x.shape[1], pltpu.SMEM) for x in lists]
            specs.append(pl.BlockSpec(memory_space=pl.ANY))
        scalars = [_pad_rows(row_B, group), flag_B, flag_G, extent]
        return names, [*scalars, logits_BV, jnp.stack(floats, axis=1), jnp.stack(ints, axis=1), *late], specs

    def _finish(self, found: list[jax.Array], size: int) -> tuple[Best, Candidates | None]:
        floats, ids, *levels = found
        max_BP, sum_BP, noised_BP = jnp.split(floats, 3, axis=1)
        id_BP, noised_id_BP = jnp.split(ids, 2, axis=1)
        best, sum_B = best_of(Lanes(max_BP, id_BP, sum_BP), Noised(noised_BP, noised_id_BP), self._shard, size)
        if not levels:
            return best, None
        value_BJP, id_BJP = (x.reshape(-1, DEPTH, NUM_BUCKETS) for x in levels)
        return best, candidates_of(value_BJP, id_BJP, sum_B, self._shard, size)


def _pad_rows(x: jax.Array, group: int) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % group), *((0, 0),) * (x.ndim - 1)))


def _body(names: list[str], block: int, size: int) -> Callable[..., None]:
    """Return a new kernel function over the refs of these names; `size` is V rounded up to whole tiles."""

    def body(*arrays: Any) -> None:
        absent = dict.fromkeys(_Refs._fields)
        refs = _Refs(**{**absent, **dict(zip(names, arrays, strict=True))})
        flags = refs.group_flags[pl.program_id(0)]
        pl.when(pl.program_id(1) == 0)(lambda: _start(refs))
        source = refs.logits
        if refs.values is not None:
            source = refs.values
            _adjust(refs, block, size)
        _add_best(refs, source, block)
        pl.when(flags & _NOISY != 0)(lambda: _add_noised(refs, source, block))
        if refs.level_values is not None:
            pl.when(flags & _LISTED != 0)(lambda: _add_levels(refs, source, block))

    return body


def _start(refs: _Refs) -> None:
    shape = (refs.kept_floats.shape[0], _LANES)
    _store(refs, Lanes.empty(shape), Noised.empty(shape))
    if refs.level_values is not None:
        refs.level_values[...] = jnp.full(refs.level_values.shape, -jnp.inf, jnp.float32)
        refs.level_ids[...] = jnp.zeros(refs.level_ids.shape, jnp.int32)


def _store(refs: _Refs, lanes: Lanes | None = None, noised: Noised | None = None) -> None:
    if lanes is not None:
        refs.kept_floats[:, :_LANES], refs.kept_ids[:, :_LANES] = lanes.max, lanes.id
        refs.kept_floats[:, _LANES : 2 * _LANES] = lanes.sum
    if noised is not None:
        refs.kept_floats[:, 2 * _LANES :], refs.kept_ids[:, _LANES:] = noised.max, noised.id


def _tile(index: Any) -> Any:
    return pl.ds(pl.multiple_of(index * _LANES, _LANES), _LANES)


def _column(ref: Any, index: int) -> jax.Array:
    """Broadcast one value per row to all lanes."""
    return jnp.broadcast_to(ref[:, index : index + 1], (ref.shape[0], _LANES))


def _ids(refs: _Refs, index: jax.Array, block: int) -> jax.Array:
    """Return the i32 ids of a tile, relative to the shard's first id."""
    lane = lax.broadcasted_iota(jnp.int32, (refs.logits.shape[0], _LANES), 1)
    return lane + (pl.program_id(1) * block + index * _LANES)


def _read(refs: _Refs, source: Any, index: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Return a tile's values over temperature, and its ids; -inf past the end, where a block holds arbitrary data."""
    ids = _ids(refs, index, block)
    return jnp.where(ids < refs.extent[1], source[:, _tile(index)] * _column(refs.floats, 0), -jnp.inf), ids


def _add_best(refs: _Refs, source: Any, block: int) -> None:
    def step(chunk: jax.Array, lanes: Lanes) -> Lanes:
        read = [_read(refs, source, chunk * _TILES + u, block) for u in range(_TILES)]
        return lanes.add([value for value, _ in read], [ids for _, ids in read])

    lanes = Lanes(refs.kept_floats[:, :_LANES], refs.kept_ids[:, :_LANES], refs.kept_floats[:, _LANES : 2 * _LANES])
    _store(refs, lanes=lax.fori_loop(0, block // NUM_BUCKETS, step, lanes))


def _add_noised(refs: _Refs, source: Any, block: int) -> None:
    low, high, position = (lax.bitcast_convert_type(_column(refs.ints, index), jnp.uint32) for index in range(3))

    def step(index: jax.Array, noised: Noised) -> Noised:
        for u in range(2):
            value, ids = _read(refs, source, 2 * index + u, block)
            noised = noised.add(value, ids, refs.extent[0], (low, high, position))
        return noised

    noised = Noised(refs.kept_floats[:, 2 * _LANES :], refs.kept_ids[:, _LANES:])
    _store(refs, noised=lax.fori_loop(0, block // _LANES // 2, step, noised))


def _add_levels(refs: _Refs, source: Any, block: int) -> None:
    """Update the levels of one eighth of the buckets at a time, which take 8 vector registers."""

    def eighth(u: jax.Array, _: None) -> None:
        def step(chunk: jax.Array, levels: Any) -> Any:
            return insert(levels, *_read(refs, source, chunk * _TILES + u, block))

        at = [_tile(j * _TILES + u) for j in range(DEPTH)]
        levels = tuple(refs.level_values[:, a] for a in at), tuple(refs.level_ids[:, a] for a in at)
        values, ids = lax.fori_loop(0, block // NUM_BUCKETS, step, levels, unroll=4)
        for a, value, token in zip(at, values, ids, strict=True):
            refs.level_values[:, a], refs.level_ids[:, a] = value, token

    lax.fori_loop(0, _TILES, eighth, None)


def _adjust(refs: _Refs, block: int, size: int) -> None:
    """Write the block's adjusted logits to `values`."""
    flags = refs.group_flags[pl.program_id(0)]
    pl.when(flags & _PENALISED != 0)(lambda: _fetch_counts(refs, block, size))
    penalties = _column(refs.floats, 1), _column(refs.floats, 2), _column(refs.floats, 3)
    masked = _column(refs.ints, 3) != 0

    def penalised_step(index: jax.Array, _: None) -> None:
        at = _tile(index)
        refs.values[:, at] = penalise(refs.logits[:, at], refs.row_counts[:, at], penalties)

    def copy_step(index: jax.Array, _: None) -> None:
        at = _tile(index)
        refs.values[:, at] = refs.logits[:, at]

    def mask_step(index: jax.Array, _: None) -> None:
        at = _tile(index)
        bit = (refs.planes[:, _tile(index // MASK_BITS)] >> (index % MASK_BITS)) & 1
        refs.values[:, at] = jnp.where(masked & (bit == 0), -jnp.inf, refs.values[:, at])

    tiles = block // _LANES
    pl.when(flags & _PENALISED != 0)(lambda: lax.fori_loop(0, tiles, penalised_step, None))
    pl.when(flags & _PENALISED == 0)(lambda: lax.fori_loop(0, tiles, copy_step, None))
    pl.when(flags & _ADJUSTED != 0)(lambda: lax.fori_loop(0, tiles, mask_step, None))
    pl.when(flags & _ADJUSTED != 0)(lambda: _add_lists(refs, block))


def _fetch_counts(refs: _Refs, block: int, size: int) -> None:
    """Copy the counts of each state row from HBM; rows without penalties keep stale counts, which they ignore."""
    group = refs.row_counts.shape[0]
    start = pl.multiple_of(pl.program_id(1) * block, _LANES)
    tail = size % block

    def each(width: int, act: Callable[[Any], None]) -> None:
        for r in range(group):
            sample = pl.program_id(0) * group + r

            @pl.when(refs.sample_flags[sample] & _PENALISED != 0)
            def _(r: int = r, sample: Any = sample) -> None:
                source = refs.counts.at[pl.ds(refs.state_row[sample], 1), pl.ds(start, width)]
                act(pltpu.make_async_copy(source, refs.row_counts.at[pl.ds(r, 1), pl.ds(0, width)], refs.sems.at[r]))

    def fetch(width: int) -> None:
        each(width, lambda copy: copy.start())
        each(width, lambda copy: copy.wait())

    if tail == 0:
        fetch(block)
        return
    last = pl.program_id(1) == pl.num_programs(1) - 1
    pl.when(last)(lambda: fetch(tail))
    if size > block:
        pl.when(~last)(lambda: fetch(block))


def _add_lists(refs: _Refs, block: int) -> None:
    """Apply bias and forbidden ids of this block, one entry at a time: they are few, and most rows have none."""
    group = refs.values.shape[0]
    v = pl.program_id(1)
    shape = (group, _LANES)
    row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))

    def per_row(r: jax.Array, _: None) -> None:
        def entry(e: jax.Array, _: None) -> None:
            local = refs.list_ids[r, e] - v * block
            at = _tile(local // _LANES)
            here = (row == r) & (lane == local % _LANES)
            tile = refs.values[:, at]
            refs.values[:, at] = jnp.where(here, tile + refs.list_values[r, e], tile)

        lax.fori_loop(refs.list_begin[r, v], refs.list_begin[r, v + 1], entry, None)

    lax.fori_loop(0, group, per_row, None)


assert math.log2(DEPTH) % 1 == 0, "merge_levels is a bitonic merge"
