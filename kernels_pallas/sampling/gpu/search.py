"""Search of the rows that the candidates do not decide, as one kernel (Pallas Mosaic GPU, Hopper and later).

The host does not know whether a step has such rows, so a program that branched on it would wait for the device. Here
each row has a block of threads, which ends at once where the row is decided. One warpgroup loads 4096 values per step
directly from HBM (later passes: from L2) to registers, the next step's while it processes this step's.

A split vocabulary is gathered by rows: each of N devices receives B / N whole rows. That moves 4 B V bytes over all
devices once, which costs less than one collective per step of the bisection.

Dimension key: B rows of logits, G rows of this device, V ids, J top log-probabilities, N devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.sampling.api import NUM_TOP_LOGPROBS, SamplingInputs
from kernels_pallas.sampling.common.bisection import (
    Limits,
    find_edge,
    find_last_id,
    image_below,
    image_of,
    unlikely,
    without_minus_zero,
)
from kernels_pallas.sampling.common.buckets import Noised
from kernels_pallas.sampling.common.search import Exact, Known, Search
from kernels_pallas.sampling.common.summary import Shard, inverse_temperature, unbounded_top_p

_CHUNK = 4096
_UNDECIDED, _SHORT = 1, 2

C = TypeVar("C")


def kernel_search(adjusted_BV: jax.Array, inputs: SamplingInputs, shard: Shard, interpret: Any) -> Search:
    """Return the search of rows in their adjusted logits, f32[B, V], before temperature."""

    def search(found: Exact, known: Known) -> Exact:
        new = _search(adjusted_BV, inputs, known, shard, interpret)
        short_B1 = known.short_B[:, None]
        return Exact(
            jnp.where(known.undecided_B, new.token_B, found.token_B),
            jnp.where(short_B1, new.top_ids_BJ, found.top_ids_BJ),
            jnp.where(short_B1, new.top_BJ, found.top_BJ),
        )

    return search


def _search(adjusted_BV: jax.Array, inputs: SamplingInputs, known: Known, shard: Shard, interpret: Any) -> Exact:
    """Run the kernel on every row; the results of rows, and parts of rows, that need none are arbitrary."""
    floats_B6, ints_B5 = _parameters(inputs, known, shard)
    rows = adjusted_BV.shape[0]
    own = [_own_rows(x, shard) for x in (floats_B6, ints_B5)]
    value_GV = _whole_rows(adjusted_BV, shard)
    # Padding copies the values, but only for vocabularies that no model in use has.
    padding = max(_CHUNK, -(-value_GV.shape[1] // 4) * 4) - value_GV.shape[1]
    value_GV = jnp.pad(value_GV, ((0, 0), (0, padding)))
    group, size = value_GV.shape
    exact = plgpu.kernel(
        _body(size, shard.vocab_size),
        out_type=(
            jax.ShapeDtypeStruct((group,), jnp.int32),
            jax.ShapeDtypeStruct((group, NUM_TOP_LOGPROBS), jnp.int32),
            jax.ShapeDtypeStruct((group, NUM_TOP_LOGPROBS), jnp.float32),
        ),
        grid=(group,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret,
    )(value_GV, *own)
    if shard.axis_name is not None:
        exact = lax.all_gather(exact, shard.axis_name, tiled=True)
    return Exact(*(x[:rows] for x in exact))


def _parameters(inputs: SamplingInputs, known: Known, shard: Shard) -> tuple[jax.Array, jax.Array]:
    """Return f32[B, 6] and i32[B, 5], in the order in which the kernel reads them."""
    limits = Limits(inputs.top_k_B, unbounded_top_p(inputs))
    least_mass_B = inputs.min_p_B * jnp.exp(known.max_B - known.log_sum_B)
    unlikely_B = unlikely(limits, inputs.min_p_B, known.max_B, known.log_sum_B, shard.vocab_size)
    floats = (
        inverse_temperature(inputs),
        limits.top_p,
        known.log_sum_B,
        least_mass_B,
        without_minus_zero(known.bound_B),
        without_minus_zero(unlikely_B),
    )
    flags_B = jnp.where(known.undecided_B, _UNDECIDED, 0) | jnp.where(known.short_B, _SHORT, 0)
    seeds_B2 = lax.bitcast_convert_type(inputs.seed_B2, jnp.int32)
    ints = (seeds_B2[:, 0], seeds_B2[:, 1], inputs.position_B, inputs.top_k_B, flags_B)
    return jnp.stack(floats, axis=1), jnp.stack(ints, axis=1)


def _own_rows(x_BX: jax.Array, shard: Shard) -> jax.Array:
    """Return this device's rows [G, X] of those that all devices have."""
    if shard.axis_name is None:
        return x_BX
    padded = _pad_rows(x_BX, shard)
    group = padded.shape[0] // shard.num_shards()
    return lax.dynamic_slice_in_dim(padded, lax.axis_index(shard.axis_name) * group, group)


def _whole_rows(x_BV: jax.Array, shard: Shard) -> jax.Array:
    """Exchange parts of all rows for all of this device's rows, [G, N V]."""
    if shard.axis_name is None:
        return x_BV
    return lax.all_to_all(_pad_rows(x_BV, shard), shard.axis_name, split_axis=0, concat_axis=1, tiled=True)


def _pad_rows(x_BX: jax.Array, shard: Shard) -> jax.Array:
    return jnp.pad(x_BX, ((0, -x_BX.shape[0] % shard.num_shards()), (0, 0)))


class _Row(NamedTuple):
    """One row of the kernel, and its parameters.

    Attributes:
        values: HBM f32[V], adjusted logits.
        size: V; ids from `vocab_size` are padding.
        scale: inverse temperature.
        least_mass: mass below which min-p drops a token.
        bound, unlikely: values above which all tokens, and below which no tokens are kept.
        key: u32 seed halves and position.
    """

    values: Any
    size: int
    vocab_size: int
    scale: jax.Array
    limits: Limits
    log_sum: jax.Array
    least_mass: jax.Array
    bound: jax.Array
    unlikely: jax.Array
    key: tuple[jax.Array, jax.Array, jax.Array]

    def scan(self, add: Callable[[jax.Array, jax.Array, C], C], carry: C) -> C:
        """Add all values, f32[4096], with their ids to a carry; values of ids that do not exist are -inf."""
        chunks = -(-self.size // _CHUNK)

        def start(chunk: jax.Array) -> jax.Array:
            # The last chunk ends with the row and overlaps the one before.
            return jnp.minimum(chunk * _CHUNK, self.size - _CHUNK)

        def load(chunk: jax.Array) -> jax.Array:
            return self.values[pl.ds(start(chunk), _CHUNK)]

        def step(chunk: jax.Array, carry: tuple[jax.Array, C]) -> tuple[jax.Array, C]:
            loaded, kept = carry
            following = load(jnp.minimum(chunk + 1, chunks - 1))
            ids = lax.broadcasted_iota(jnp.int32, (_CHUNK,), 0) + start(chunk)
            fresh = (ids >= chunk * _CHUNK) & (ids < self.vocab_size)
            value = jnp.where(fresh, without_minus_zero(loaded * self.scale), -jnp.inf)
            return following, add(value, ids, kept)

        return lax.fori_loop(0, chunks, step, (load(jnp.int32(0)), carry))[1]


def _body(size: int, vocab_size: int) -> Callable[..., None]:
    """Return a new kernel function for rows of `size` values."""

    def sample_exactly(values: Any, floats: Any, ints: Any, token: Any, top_ids: Any, top: Any) -> None:
        index = lax.axis_index("row")
        scale, top_p, log_sum, least_mass, bound, unlikely_ = (floats[index, i] for i in range(6))
        low, high, position, top_k, flags = (ints[index, i] for i in range(5))
        row = _Row(
            values=values.at[index],
            size=size,
            vocab_size=vocab_size,
            scale=scale,
            limits=Limits(top_k, top_p),
            log_sum=log_sum,
            least_mass=least_mass,
            bound=bound,
            unlikely=unlikely_,
            key=(low.astype(jnp.uint32), high.astype(jnp.uint32), position.astype(jnp.uint32)),
        )

        @pl.when(flags & _UNDECIDED != 0)
        def _() -> None:
            token[index] = _sample(row)

        @pl.when(flags & _SHORT != 0)
        def _() -> None:
            _list_top(row, top_ids.at[index], top.at[index])

    return sample_exactly


def _sample(row: _Row) -> jax.Array:
    """Sample a token, i32, exactly."""
    zeros = jnp.zeros((_CHUNK,), jnp.float32)

    def above(image: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(value: jax.Array, ids: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            above = image_of(value) > image
            count, mass = sums
            return count + jnp.where(above, 1.0, 0.0), mass + jnp.where(above, jnp.exp(value - row.log_sum), 0.0)

        count, mass = row.scan(add, (zeros, zeros))
        # Counts stay below 2**24, so they are exact in f32.
        return jnp.sum(count).astype(jnp.int32), jnp.sum(mass)

    low = jnp.maximum(image_below(_smallest(row)), image_of(row.unlikely))
    edge = find_edge(above, low, image_of(row.bound), row.limits)

    def up_to(last_id: jax.Array) -> jax.Array:
        def add(value: jax.Array, ids: jax.Array, count: jax.Array) -> jax.Array:
            image = image_of(value)
            return count + jnp.where((image > edge.low) & (image <= edge.high) & (ids <= last_id), 1.0, 0.0)

        return jnp.sum(row.scan(add, zeros)).astype(jnp.int32)

    last_id = find_last_id(up_to, edge, row.limits, row.log_sum, row.vocab_size)

    def add_noised(value: jax.Array, ids: jax.Array, noised: Noised) -> Noised:
        image = image_of(value)
        kept = (image > edge.high) | ((image > edge.low) & (ids <= last_id))
        kept &= jnp.exp(value - row.log_sum) >= row.least_mass
        return noised.add(jnp.where(kept, value, -jnp.inf), ids, jnp.int32(0), row.key)

    noised = row.scan(add_noised, Noised.empty((_CHUNK,)))
    return first_of_largest(noised.max, noised.id)[1]


def _smallest(row: _Row) -> jax.Array:
    """Return the smallest value above -inf."""

    def add(value: jax.Array, ids: jax.Array, smallest: jax.Array) -> jax.Array:
        return jnp.minimum(smallest, jnp.where(value == -jnp.inf, jnp.inf, value))

    return jnp.min(row.scan(add, jnp.full((_CHUNK,), jnp.inf, jnp.float32)))


def _list_top(row: _Row, top_ids: Any, top: Any) -> None:
    """Write the `NUM_TOP_LOGPROBS` largest values in order: each pass finds the first that ranks after the last."""

    def place(j: jax.Array, last: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        last_value, last_id = last

        def add(value: jax.Array, ids: jax.Array, kept: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            after = (value < last_value) | ((value == last_value) & (ids > last_id))
            larger = after & (value > kept[0])
            return jnp.where(larger, value, kept[0]), jnp.where(larger, ids, kept[1])

        empty = (jnp.full((_CHUNK,), -jnp.inf, jnp.float32), jnp.zeros((_CHUNK,), jnp.int32))
        value, token = first_of_largest(*row.scan(add, empty))
        top[j] = value
        top_ids[j] = token
        return value, token

    lax.fori_loop(0, NUM_TOP_LOGPROBS, place, (jnp.float32(jnp.inf), jnp.int32(-1)))


def first_of_largest(value: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the largest value of a chunk and its lowest id."""
    high = jnp.max(value)
    return high, jnp.min(jnp.where(value == high, ids, jnp.iinfo(jnp.int32).max))
