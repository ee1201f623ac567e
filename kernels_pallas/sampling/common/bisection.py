"""The threshold of top-k and top-p by bisection, without a sort.

Top-k and top-p keep a prefix of the row in order of value, so they amount to a threshold: whether a token of value t is
kept follows from the count and the mass of the tokens above t. Equal values at the threshold are cut by id, by a second
bisection. All functions are elementwise, so arguments are arrays of rows in XLA and scalars in a kernel.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Bisecting the range of values separates tokens fastest; bisecting the range of bit patterns always terminates.
_STEPS_BY_VALUE = 24
# Log-masses closer than this to a bound are left to the search, which applies the filters as defined.
_MARGIN = 0.01
# Threads of a warpgroup.
_THREADS = 128


class Limits(NamedTuple):
    """What the filters of a row keep.

    Attributes:
        top_k: i32.
        top_p: f32; inf where all tokens are kept, however the total mass rounds.
    """

    top_k: jax.Array
    top_p: jax.Array


class Edge(NamedTuple):
    """Bounds on a row's threshold: images above `high` are kept, images up to `low` are not.

    Attributes:
        low, high: i32 images; after the search, the tokens in between are none, one, or several of equal value.
        count_above, mass_above: i32 and f32, count and mass of the tokens above `high`.
        count_between: i32, number of tokens above `low` and up to `high`.
    """

    low: jax.Array
    high: jax.Array
    count_above: jax.Array
    mass_above: jax.Array
    count_between: jax.Array


def image_of(value: jax.Array) -> jax.Array:
    """Map f32 values, none of them -0, to i32 in the same order; on the bits, the map is its own inverse."""
    bits = _bitcast(value, jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def from_image(image: jax.Array) -> jax.Array:
    """Return the f32 value of an i32 image."""
    return _bitcast(image ^ ((image >> 31) & jnp.int32(0x7FFFFFFF)), jnp.float32)


def image_below(smallest: jax.Array) -> jax.Array:
    """Return the largest image below that of a finite f32 value."""
    return image_of(without_minus_zero(smallest)) - 1


def without_minus_zero(value: jax.Array) -> jax.Array:
    """Replace -0 by 0: they compare equal, so they must have the same image."""
    return jnp.where(value == 0, 0.0, value)


def unlikely(limits: Limits, min_p: jax.Array, max_value: jax.Array, log_sum: jax.Array, vocab_size: int) -> jax.Array:
    """Return f32 values such that the filters keep no token of a smaller value; -inf where there is none."""
    # Tokens with a mass of at most (1 - p) / V have at most a mass of 1 - p together.
    by_top_p = log_sum + jnp.log(jnp.maximum(1 - limits.top_p, 0.0) / vocab_size) - _MARGIN
    by_min_p = max_value + jnp.log(min_p) - _MARGIN
    return jnp.maximum(by_top_p, by_min_p)


def find_edge(
    above: Callable[[jax.Array], tuple[jax.Array, jax.Array]], low: jax.Array, high: jax.Array, limits: Limits
) -> Edge:
    """Find the threshold.

    Args:
        above: returns the count, i32, and the mass, f32, of the tokens above an image.
        low: i32 images; no token up to it is kept.
        high: i32 images; all tokens above it are kept.
        limits: what to keep.
    """

    def is_open(edge: Edge) -> jax.Array:
        # The difference of two images may overflow i32: compare, never subtract.
        return (edge.count_between > 1) & (edge.low + 1 < edge.high)

    def step(carry: tuple[jax.Array, Edge]) -> tuple[jax.Array, Edge]:
        index, edge = carry
        middle = _middle(edge.low, edge.high, index < _STEPS_BY_VALUE)
        count, mass = above(middle)
        kept = (count < limits.top_k) & (mass <= limits.top_p)
        count_high_low = edge.count_above + edge.count_between
        lower = Edge(edge.low, middle, count, mass, count_high_low - count)
        upper = edge._replace(low=middle, count_between=count - edge.count_above)
        # A finished row stays as it is while other rows continue.
        new = jax.tree.map(lambda x, y: jnp.where(kept, x, y), lower, upper)
        return index + 1, jax.tree.map(lambda x, y: jnp.where(is_open(edge), x, y), new, edge)

    low = jnp.minimum(low, high - 1)
    count, mass = above(high)
    count_low, mass_low = above(low)
    # Where min-p gives the lower bound, top-k and top-p may keep everything above it.
    all_kept = (count_low < limits.top_k) & (mass_low <= limits.top_p)
    edge = Edge(
        low,
        jnp.where(all_kept, low, high),
        jnp.where(all_kept, count_low, count),
        jnp.where(all_kept, mass_low, mass),
        jnp.where(all_kept, 0, count_low - count),
    )
    return lax.while_loop(lambda carry: _any(is_open(carry[1])), step, (jnp.int32(0), edge))[1]


def find_last_id(
    up_to: Callable[[jax.Array], jax.Array], edge: Edge, limits: Limits, log_sum: jax.Array, vocab_size: int
) -> jax.Array:
    """Return the last id to keep of the tokens at the threshold, i32: lowest ids are kept first, while they fit.

    Args:
        up_to: returns the number of tokens at the threshold with ids up to a given one, i32.
        edge: the threshold.
        limits: what to keep.
        log_sum: f32, log of the sum of exp of all values.
        vocab_size: size of the vocabulary.
    """
    mass = jnp.exp(from_image(edge.high) - log_sum)
    # The first token at the threshold is kept, whatever the sums round to; else the threshold would be higher.
    after_first = jnp.clip((limits.top_p - edge.mass_above) / mass, 0, vocab_size - 1).astype(jnp.int32)
    fits = jnp.minimum(after_first + 1, limits.top_k - edge.count_above)

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = carry
        middle = (low + high) >> 1
        fit = up_to(middle) <= fits
        return jnp.where(fit, middle, low), jnp.where(fit, high, middle)

    # Ids up to `low` fit, ids up to `high` do not; a row where all fit needs no search.
    low = jnp.where(edge.count_between <= fits, vocab_size - 1, -1)
    high = jnp.full_like(low, vocab_size)
    return lax.while_loop(lambda carry: _any(carry[0] + 1 < carry[1]), step, (low, high))[0]


def _middle(low: jax.Array, high: jax.Array, by_value: jax.Array) -> jax.Array:
    """Return an image between two others, distinct from both if there is one."""
    halves = (low >> 1) + (high >> 1) + (low & high & 1)
    mean = image_of(without_minus_zero(0.5 * from_image(low) + 0.5 * from_image(high)))
    return jnp.where(by_value, jnp.clip(mean, low + 1, high - 1), halves)


def _bitcast(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Reinterpret bits; a kernel can only do that in a vector, one entry per thread."""
    if x.ndim:
        return lax.bitcast_convert_type(x, dtype)
    return jnp.max(lax.bitcast_convert_type(jnp.full((_THREADS,), x), dtype))


def _any(x: jax.Array) -> jax.Array:
    """Reduce rows; a kernel has no reduction of scalars."""
    return jnp.any(x) if x.ndim else x
