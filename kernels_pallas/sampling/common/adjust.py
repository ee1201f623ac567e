"""From logits to the values that are sampled from: penalties, mask, bias, forbidden tokens. Plain XLA.

Temperature is left to the callers: it does not change the order of values, so code that only compares can skip it.

Dimension key: B rows of logits, R state rows, V the shard's ids, J entries of a list, W words of a mask.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.sampling.api import MASK_BITS, SamplingInputs, SamplingState
from kernels_pallas.sampling.common.summary import Shard, inverse_temperature, penalised

_FEW_ROWS = 8


def penalise(value: jax.Array, count: jax.Array, penalties: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """Apply (repetition, frequency, presence) penalties to f32 values; an i32 count of 0 leaves a value unchanged."""
    repetition, frequency, presence = penalties
    repeated = value * jnp.where(value < 0, repetition, 1.0 / repetition)
    less = frequency * count.astype(jnp.float32) + presence
    return jnp.where(count > 0, repeated - less, value)


def adjust_logits(logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState, shard: Shard) -> jax.Array:
    """Return f32[B, V] values before temperature; -inf for forbidden tokens and padding ids."""

    def unchanged(x_BV: jax.Array) -> jax.Array:
        return x_BV

    def penalties(x_BV: jax.Array) -> jax.Array:
        return penalise(x_BV, _rows_of(state.counts_RV, inputs.row_B), _columns(inputs))

    def mask(x_BV: jax.Array) -> jax.Array:
        return jnp.where(allowed_ids(inputs, shard, x_BV.shape[1]), x_BV, -jnp.inf)

    def lists(x_BV: jax.Array) -> jax.Array:
        ids_BJ, values_BJ = sparse_lists(inputs, state, shard, x_BV.shape[1])
        return x_BV.at[jnp.arange(x_BV.shape[0])[:, None], ids_BJ].add(values_BJ, mode="drop")

    x_BV = lax.cond(jnp.any(penalised(inputs)), penalties, unchanged, logits_BV)
    x_BV = lax.cond(jnp.any(inputs.masked_B), mask, unchanged, x_BV)
    x_BV = lax.cond(jnp.any(inputs.biased_B | inputs.forbid_stops_B), lists, unchanged, x_BV)
    return without_padding(x_BV, shard)


def _rows_of(table_RV: jax.Array, row_B: jax.Array) -> jax.Array:
    """Gather rows; a few are sliced one by one, since XLA for TPU copies the whole table to gather long rows."""
    if len(row_B) > _FEW_ROWS:
        return table_RV[row_B]
    return jnp.concatenate([lax.dynamic_slice_in_dim(table_RV, row, 1) for row in row_B])


def without_padding(x_BV: jax.Array, shard: Shard) -> jax.Array:
    """Set ids past the vocabulary to -inf; they exist only if the shards do not divide the vocabulary evenly."""
    size = x_BV.shape[1]
    if size * shard.num_shards() == shard.vocab_size:
        return x_BV
    return jnp.where(jnp.arange(size) + shard.first(size) < shard.vocab_size, x_BV, -jnp.inf)


def _columns(inputs: SamplingInputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    return inputs.repetition_B[:, None], inputs.frequency_B[:, None], inputs.presence_B[:, None]


def allowed_ids(inputs: SamplingInputs, shard: Shard, size: int) -> jax.Array:
    """Return which ids the mask allows, bool[B, V]; a shard may start inside a mask word."""
    rows, words = inputs.mask_BW.shape
    bits_BWS = (inputs.mask_BW[:, :, None] >> jnp.arange(MASK_BITS)) & 1
    bits_BV = bits_BWS.reshape(rows, words * MASK_BITS) != 0
    if shard.axis_name is None:
        bits_BV = bits_BV[:, :size]
    else:
        padding = max(0, shard.num_shards() * size - words * MASK_BITS)
        bits_BV = jnp.pad(bits_BV, ((0, 0), (0, padding)))
        bits_BV = lax.dynamic_slice_in_dim(bits_BV, shard.first(size), size, axis=1)
    return bits_BV | ~inputs.masked_B[:, None]


def sparse_lists(inputs: SamplingInputs, state: SamplingState, shard: Shard, size: int) -> tuple[jax.Array, jax.Array]:
    """Return bias and forbidden stops as one list per row: ids i32[B, J] and values f32[B, J].

    Ids are relative to the shard's first id. Ids of other shards and unused entries become `size`, past the end.
    """
    bias_BJ = jnp.where(inputs.biased_B[:, None], state.bias_ids_RJ[inputs.row_B], shard.vocab_size)
    stop_BJ = jnp.where(inputs.forbid_stops_B[:, None], state.stop_ids_RJ[inputs.row_B], shard.vocab_size)
    ids_BJ = jnp.concatenate([bias_BJ, stop_BJ], axis=1)
    forbidden_BJ = jnp.full(stop_BJ.shape, -jnp.inf, jnp.float32)
    values_BJ = jnp.concatenate([state.bias_values_RJ[inputs.row_B], forbidden_BJ], axis=1)
    local_BJ = ids_BJ - shard.first(size)
    inside_BJ = (local_BJ >= 0) & (local_BJ < size) & (ids_BJ < shard.vocab_size)
    return jnp.where(inside_BJ, local_BJ, size), values_BJ


def values_of(
    token_B: jax.Array, logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState, shard: Shard
) -> jax.Array:
    """Return the value over temperature of one token per row, f32[B], on every shard."""
    size = logits_BV.shape[1]
    local_B = token_B - shard.first(size)
    inside_B = (local_B >= 0) & (local_B < size)
    local_B = jnp.clip(local_B, 0, size - 1)
    sample_B = jnp.arange(token_B.shape[0])
    penalties = (inputs.repetition_B, inputs.frequency_B, inputs.presence_B)
    value_B = penalise(logits_BV[sample_B, local_B], state.counts_RV[inputs.row_B, local_B], penalties)
    word_B = inputs.mask_BW[sample_B, token_B // MASK_BITS]
    forbidden_B = inputs.masked_B & ((word_B >> token_B % MASK_BITS) & 1 == 0)
    ids_BJ, values_BJ = sparse_lists(inputs, state, shard, size)
    value_B += jnp.sum(jnp.where(ids_BJ == local_B[:, None], values_BJ, 0.0), axis=1)
    value_B = jnp.where(forbidden_B, -jnp.inf, value_B) * inverse_temperature(inputs)
    value_B = jnp.where(inside_B, value_B, 0.0)
    return value_B if shard.axis_name is None else lax.psum(value_B, shard.axis_name)
