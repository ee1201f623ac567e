"""Softmax over keys that are processed in parts, merged as in FlashAttention (arXiv:2205.14135)."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Finite, so that differences of masked maxima are 0 and not NaN.
MASKED = -1e30
# Above any masked score and below any real one: keys of a part without live keys get the weight
# exp(MASKED - LOWEST) = 0.
LOWEST = MASKED / 10


class PartialSoftmax(NamedTuple):
    """A softmax in progress: running maximum, sum of weights, weighted values (one axis more); all f32."""

    row_max: jax.Array
    row_sum: jax.Array
    out: jax.Array

    def values(self) -> jax.Array:
        """Return the final weighted mean."""
        return self.out / self.row_sum[..., None]


def from_sinks(sinks: jax.Array, shape: Sequence[int]) -> PartialSoftmax:
    """Return the state before any key: the sink of each head takes probability mass but has no value.

    Args:
        sinks: f32 scores, `MASKED` for no sink; broadcast to all axes of `shape` but the last.
        shape: shape of the weighted values.
    """
    row_max = jnp.broadcast_to(sinks, shape[:-1])
    return PartialSoftmax(row_max, jnp.ones(shape[:-1], jnp.float32), jnp.zeros(shape, jnp.float32))


def attend_part(
    scores: jax.Array, live: jax.Array, values: jax.Array, equation: str, live_values: jax.Array
) -> PartialSoftmax:
    """Return the partial softmax of one part's scores and values.

    Args:
        scores: f32, keys along the last axis.
        live: bool, broadcast against `scores`.
        values: the part's values; slots that are not live may hold anything, NaN included.
        equation: einsum of (weights, values).
        live_values: bool, broadcast against `values`.
    """
    scores = jnp.where(live, scores, MASKED)
    row_max = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - jnp.maximum(row_max, LOWEST)[..., None])
    weigh = partial(jnp.einsum, equation, weights.astype(values.dtype), preferred_element_type=jnp.float32)
    out = weigh(values)
    # 0 * NaN is NaN. Masking the values costs as much as the product, so it is done only if NaN came out.
    out = lax.cond(
        jnp.isnan(jnp.sum(out)),
        lambda values, _: weigh(jnp.where(live_values, values, 0)),
        lambda _, out: out,
        values,
        out,
    )
    return PartialSoftmax(row_max, jnp.sum(weights, axis=-1), out)


def merge(state: PartialSoftmax, part: PartialSoftmax) -> PartialSoftmax:
    """Merge two partial softmaxes over different keys."""
    row_max = jnp.maximum(state.row_max, part.row_max)
    old, new = jnp.exp(state.row_max - row_max), jnp.exp(part.row_max - row_max)
    return PartialSoftmax(
        row_max,
        state.row_sum * old + part.row_sum * new,
        state.out * old[..., None] + part.out * new[..., None],
    )
