"""One pass over the logits on GPU (Pallas Mosaic GPU, Hopper and later).

One warpgroup processes one split of one row, loading 1024 ids per step directly from HBM to registers; the next step's
logits are loaded while this step's are processed. Bytes per row: 4 V of logits, 4 V of counts if it is penalised, V / 8
of mask; the output is 20 bytes per split and, if candidates are needed, another 32 KB per split. Threads share nothing
before the last step of a split, when its maxima and sums are each reduced to one value.

Dimension key: B rows of logits, V the shard's ids, C chunks of 1024 ids, S splits of a row, J entries of a list, P
buckets.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.sampling.api import MASK_BITS, SampleOutput, SamplingInputs, SamplingMode, SamplingState
from kernels_pallas.sampling.common.adjust import penalise, sparse_lists
from kernels_pallas.sampling.common.buckets import (
    DEPTH,
    NUM_BUCKETS,
    Lanes,
    Levels,
    Noised,
    best_of,
    candidates_of,
    insert,
    merge_levels,
    no_levels,
)
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
from kernels_pallas.sampling.gpu.search import first_of_largest, kernel_search

_CHUNK = NUM_BUCKETS
# A thread loads 8 bytes at a time, so a row must start at a multiple of 8 bytes; 16 allow for a wider load.
_ALIGNMENT = 4
# Three warpgroups on each of 132 SMs.
_PROGRAMS = 396
# A split writes its levels once; with fewer chunks than this, that would cost more than reading the logits.
_MIN_CHUNKS = 16

_NOISY, _LISTED, _PENALISED, _MASKED = 1, 2, 4, 8


def sample(
    logits_BV: jax.Array,
    inputs: SamplingInputs,
    state: SamplingState,
    shard: Shard | None = None,
    mode: SamplingMode = SamplingMode.ADJUSTED,
    *,
    interpret: Any = None,
) -> SampleOutput:
    """Sample one token per row of f32 logits; see `combine.sample_with`."""
    shard = shard or Shard(logits_BV.shape[1])

    def summarise(
        logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState, shard: Shard, mode: SamplingMode
    ) -> Summary:
        adjusting = state if mode == SamplingMode.ADJUSTED else None
        best, candidates, adjusted_BV = _pass(
            logits_BV, inputs, adjusting, shard, listed=mode != SamplingMode.PLAIN, interpret=interpret
        )
        if candidates is None:
            return Summary(best)
        return Summary(best, candidates, kernel_search(adjusted_BV, inputs, shard, interpret))

    return sample_with(summarise, logits_BV, inputs, state, shard, mode)


class _Refs(NamedTuple):
    """Operands and results, all in HBM; None where a variant of the kernel lacks one."""

    extent: Any  # i32[2], first id of the shard and number of its ids
    logits: Any  # f32[B, V]
    floats: Any  # f32[B, 4], inverse temperature, repetition, frequency, presence
    ints: Any  # i32[B, 5], seed halves, position, state row, flags
    planes: Any  # i32[B, C / 32, 1024]
    list_ids: Any  # i32[B, J]
    list_values: Any  # f32[B, J]
    list_begin: Any  # i32[B, C + 1]
    counts: Any  # i32[R, V]
    kept_floats: Any  # f32[B, S, 3], maximum, sum, noised maximum
    kept_ids: Any  # i32[B, S, 2], ids of the maximum and of the noised maximum
    level_values: Any  # f32[B, S, DEPTH, 1024]
    level_ids: Any  # i32[B, S, DEPTH, 1024]
    adjusted: Any  # f32[B, V], adjusted logits of the rows that are listed


def _pass(
    logits_BV: jax.Array,
    inputs: SamplingInputs,
    state: SamplingState | None,
    shard: Shard,
    *,
    listed: bool,
    interpret: Any,
) -> tuple[Best, Candidates | None, jax.Array]:
    """Run one kernel; without a state no logits are adjusted. Also return the adjusted logits of listed rows."""
    rows, size = logits_BV.shape
    padding = max(_CHUNK, -(-size // _ALIGNMENT) * _ALIGNMENT) - size
    chunks = -(-(size + padding) // _CHUNK)
    splits, per_split = _splits(rows, chunks, listed=listed)
    names, operands = _operands(logits_BV, inputs, state, shard, padding)
    outs = {
        "kept_floats": jax.ShapeDtypeStruct((rows, splits, 3), jnp.float32),
        "kept_ids": jax.ShapeDtypeStruct((rows, splits, 2), jnp.int32),
    }
    if listed:
        shape = (rows, splits, DEPTH, NUM_BUCKETS)
        outs["level_values"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        outs["level_ids"] = jax.ShapeDtypeStruct(shape, jnp.int32)
    if listed and state is not None:
        outs["adjusted"] = jax.ShapeDtypeStruct((rows, size + padding), jnp.float32)
    found = plgpu.kernel(
        _body([*names, *outs], per_split, chunks, size + padding),
        out_type=tuple(outs.values()),
        grid=(rows, splits),
        grid_names=("row", "split"),
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret,
    )(*operands)
    refs = _Refs(**{**dict.fromkeys(_Refs._fields), **dict(zip(outs, found, strict=True))})
    lanes = Lanes(refs.kept_floats[..., 0], refs.kept_ids[..., 0], refs.kept_floats[..., 1])
    best, sum_B = best_of(lanes, Noised(refs.kept_floats[..., 2], refs.kept_ids[..., 1]), shard, size)
    adjusted_BV = logits_BV if refs.adjusted is None else refs.adjusted[:, :size]
    if not listed:
        return best, None, adjusted_BV
    value_BJP, id_BJP = merge_levels(refs.level_values, refs.level_ids)
    return best, candidates_of(value_BJP, id_BJP, sum_B, shard, size), adjusted_BV


def _splits(rows: int, chunks: int, *, listed: bool) -> tuple[int, int]:
    """Return the number of splits of a row and the number of chunks per split."""
    wanted = -(-_PROGRAMS // rows)
    max_splits = chunks // _MIN_CHUNKS if listed else chunks
    per_split = -(-chunks // max(1, min(wanted, max_splits)))
    return -(-chunks // per_split), per_split


def _operands(
    logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState | None, shard: Shard, padding: int
) -> tuple[list[str], list[jax.Array]]:
    size = logits_BV.shape[1]
    plan = plan_sampling(inputs, shard.vocab_size)
    flags = (
        (plan.noisy_B, _NOISY),
        (plan.listed_B, _LISTED),
        (penalised(inputs), _PENALISED),
        (inputs.masked_B, _MASKED),
    )
    flag_B = sum((jnp.where(x_B, bit, 0) for x_B, bit in flags), jnp.zeros(logits_BV.shape[0], jnp.int32))
    first = shard.first(size)
    extent = jnp.stack([first, jnp.minimum(size, shard.vocab_size - first)])
    floats = (inverse_temperature(inputs), inputs.repetition_B, inputs.frequency_B, inputs.presence_B)
    seeds_B2 = lax.bitcast_convert_type(inputs.seed_B2, jnp.int32)
    ints = (seeds_B2[:, 0], seeds_B2[:, 1], inputs.position_B, inputs.row_B, flag_B)
    names = ["extent", "logits", "floats", "ints"]
    # Padding copies the logits, but only for vocabulary sizes that no model in use has.
    operands = [extent, _pad(logits_BV, padding), jnp.stack(floats, axis=1), jnp.stack(ints, axis=1)]
    if state is None:
        return names, operands
    chunks = -(-(size + padding) // _CHUNK)
    # As in the kernel, the last chunk ends with the row and overlaps the one before.
    chunk_words = _CHUNK // MASK_BITS
    whole_BW = mask_words_from(inputs.mask_BW, first, (chunks - 1) * chunk_words)
    last_BW = mask_words_from(inputs.mask_BW, first + size + padding - _CHUNK, chunk_words)
    words_BW = jnp.concatenate([whole_BW, last_BW], axis=1)
    planes = bit_planes(words_BW.reshape(words_BW.shape[0], chunks, chunk_words))
    lists = sorted_lists(*sparse_lists(inputs, state, shard, size), _CHUNK, chunks)
    return (
        [*names, "planes", "list_ids", "list_values", "list_begin", "counts"],
        [*operands, planes, *lists, _pad(state.counts_RV, padding)],
    )


def _pad(x: jax.Array, padding: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, padding))) if padding else x


class _Kept(NamedTuple):
    """Summary that a program carries from chunk to chunk: per thread 64 registers for levels and 40 for the rest."""

    lanes: Lanes
    noised: Noised
    levels: Levels | None


def _body(names: list[str], per_split: int, chunks: int, size: int) -> Callable[..., None]:
    """Return a new kernel function over the refs of these names."""

    def body(*arrays: Any) -> None:
        absent = dict.fromkeys(_Refs._fields)
        refs = _Refs(**{**absent, **dict(zip(names, arrays, strict=True))})
        row, split = lax.axis_index("row"), lax.axis_index("split")
        flags = refs.ints[row, 4]
        begin = split * per_split
        end = jnp.minimum(begin + per_split, chunks)

        def load(chunk: jax.Array) -> jax.Array:
            return refs.logits[row, pl.ds(_start(chunk, size), _CHUNK)]

        def step(chunk: jax.Array, carry: tuple[jax.Array, _Kept]) -> tuple[jax.Array, _Kept]:
            logits, kept = carry
            # The last step loads its own chunk again.
            following = load(jnp.minimum(chunk + 1, end - 1))
            return following, _add(refs, chunk, logits, kept, row, flags, size)

        shape = (_CHUNK,)
        levels = None if refs.level_values is None else no_levels(shape)
        kept = _Kept(Lanes.empty(shape), Noised.empty(shape), levels)
        _, kept = lax.fori_loop(begin, end, step, (load(begin), kept))
        _store(refs, kept, row, split)

    # Profiles show this name.
    body.__name__ = f"sample_{'plain' if 'counts' not in names else 'adjusted'}_{len(names)}"
    return body


def _start(chunk: jax.Array, size: int) -> jax.Array:
    """Return the first id that a chunk reads; the last chunk ends with the row."""
    return jnp.minimum(chunk * _CHUNK, size - _CHUNK)


def _add(
    refs: _Refs, chunk: jax.Array, value: jax.Array, kept: _Kept, row: jax.Array, flags: jax.Array, size: int
) -> _Kept:
    """Return the summary with one more chunk added."""
    start = _start(chunk, size)
    ids = lax.broadcasted_iota(jnp.int32, (_CHUNK,), 0) + start
    if refs.counts is not None:
        value = _adjust(refs, chunk, value, ids, row, flags, size)
        if refs.adjusted is not None:
            adjusted = value

            @pl.when(flags & _LISTED != 0)
            def _() -> None:
                refs.adjusted[row, pl.ds(start, _CHUNK)] = adjusted

    # Exclude ids that the previous chunk covers, and ids past the end.
    fresh = (ids >= chunk * _CHUNK) & (ids < refs.extent[1])
    value = jnp.where(fresh, value * refs.floats[row, 0], -jnp.inf)
    lanes = kept.lanes.add([value], [ids])
    noised = lax.cond(
        flags & _NOISY != 0,
        lambda noised: noised.add(value, ids, refs.extent[0], _key(refs, row)),
        lambda noised: noised,
        kept.noised,
    )
    if kept.levels is None:
        return _Kept(lanes, noised, None)
    levels = lax.cond(
        flags & _LISTED != 0, lambda levels: insert(levels, value, ids), lambda levels: levels, kept.levels
    )
    return _Kept(lanes, noised, levels)


def _key(refs: _Refs, row: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    low, high, position = (refs.ints[row, index].astype(jnp.uint32) for index in range(3))
    return low, high, position


def _adjust(
    refs: _Refs, chunk: jax.Array, value: jax.Array, ids: jax.Array, row: jax.Array, flags: jax.Array, size: int
) -> jax.Array:
    start = _start(chunk, size)
    penalties = (refs.floats[row, 1], refs.floats[row, 2], refs.floats[row, 3])

    def penalised_(value: jax.Array) -> jax.Array:
        return penalise(value, refs.counts[refs.ints[row, 3], pl.ds(start, _CHUNK)], penalties)

    def masked(value: jax.Array) -> jax.Array:
        bit = (refs.planes[row, chunk // MASK_BITS, :] >> (chunk % MASK_BITS)) & 1
        return jnp.where(bit != 0, value, -jnp.inf)

    def entry(e: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.where(ids == refs.list_ids[row, e], value + refs.list_values[row, e], value)

    value = lax.cond(flags & _PENALISED != 0, penalised_, lambda value: value, value)
    value = lax.cond(flags & _MASKED != 0, masked, lambda value: value, value)
    return lax.fori_loop(refs.list_begin[row, chunk], refs.list_begin[row, chunk + 1], entry, value)


def _store(refs: _Refs, kept: _Kept, row: jax.Array, split: jax.Array) -> None:
    high, high_id = first_of_largest(kept.lanes.max, kept.lanes.id)
    refs.kept_floats[row, split, 0] = high
    refs.kept_ids[row, split, 0] = high_id
    refs.kept_floats[row, split, 1] = jnp.sum(kept.lanes.sum * jnp.exp(kept.lanes.max - high))
    noised, noised_id = first_of_largest(kept.noised.max, kept.noised.id)
    refs.kept_floats[row, split, 2] = noised
    refs.kept_ids[row, split, 1] = noised_id
    if kept.levels is None:
        return
    for j, (value, ids) in enumerate(zip(*kept.levels, strict=True)):
        refs.level_values[row, split, j, :] = value
        refs.level_ids[row, split, j, :] = ids
