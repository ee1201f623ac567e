"""Routing on Hopper GPUs: one kernel, in which a thread block chooses the experts of 64 tokens.

Each warpgroup has a part of the experts. It finds the best of them, and the warpgroups compare theirs.

Dimension key: T tokens, E experts, U experts of a token, m the 64 tokens of a thread block, W warpgroups, p experts of
one of them.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.routing.api import SMALLEST_SUM, RouterConfig, Routing
from kernels_pallas.shards import over_model
from kernels_pallas.stacked import Stacked
from kernels_pallas.warpgroup import MATRIX, ROWS, WARPGROUP_ROWS, arrive_and_wait, broadcast_rows

# Maximum number of warpgroups, with the maximum number of experts of each: threads of a larger block have fewer
# registers for a quarter of their row's scores and logits.
_MAX_PARTS = {8: 32, 6: 64}
# Columns of a tile of the register layout.
_COLUMNS = 8
# Numbers that a warpgroup tells the others at once.
_MAX_TOLD = 3


def num_parts(config: RouterConfig, num_experts: int) -> int:
    """Return the number of warpgroups that share the experts: one per group, if there are groups.

    Raises:
        NotImplementedError: the kernel cannot choose from these experts.
    """
    has_groups = config.top_groups < config.num_groups
    if has_groups and config.group_scores > 2:
        raise NotImplementedError(f"the best {config.group_scores} scores of a group: the kernel sums 1 or 2")
    most = max(_MAX_PARTS)
    for number in [config.num_groups] if has_groups else range(most, 0, -1):
        size, rest = divmod(num_experts, number)
        limit = next((size for warpgroups, size in sorted(_MAX_PARTS.items()) if number <= warpgroups), 0)
        if not rest and size % _COLUMNS == 0 and size <= limit:
            return number
    raise NotImplementedError(
        f"{num_experts} experts in {config.num_groups} groups: the kernel needs at most {most} groups of a multiple of "
        f"{_COLUMNS} experts, at most {_MAX_PARTS[most]}, or without groups parts of at most {max(_MAX_PARTS.values())}"
    )


class GpuRouter:
    """A `Router`.

    Args:
        config: how experts are chosen.
        mesh: the devices; each of them chooses the experts of all tokens of its replica.
        interpret: parameters of the GPU interpret mode, or False to compile.
    """

    def __init__(self, config: RouterConfig, mesh: Mesh, interpret: Any = False) -> None:
        self._config, self._mesh, self._interpret = config, mesh, interpret

    def __call__(self, logits_TE: jax.Array, correction: Stacked | None = None) -> Routing:
        """See `Router`."""
        return over_model(self._route, self._mesh, P(), P())(logits_TE, correction)

    def _route(self, logits_TE: jax.Array, correction: Stacked | None) -> Routing:
        num_tokens, num_experts = logits_TE.shape
        num_tiles, warpgroups = pl.cdiv(num_tokens, WARPGROUP_ROWS), num_parts(self._config, num_experts)
        # What is chosen for rows that do not exist is not used.
        shape, size = (num_tiles * WARPGROUP_ROWS, self._config.top_k), num_experts // warpgroups
        told = (2, _MAX_TOLD, warpgroups, WARPGROUP_ROWS)
        # Every call needs a new function: a function that is reused with another grid keeps its first trace.
        kernel = plgpu.kernel(
            partial(_choose, config=self._config, size=size),
            out_type=[jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32)],
            scratch_types=[
                _Scratch(
                    logits=plgpu.SMEM((warpgroups, WARPGROUP_ROWS, size), jnp.float32),
                    arrived=plgpu.Barrier(num_barriers=warpgroups),
                    told=plgpu.SMEM(told, jnp.float32),
                    all_told=plgpu.Barrier(num_arrivals=warpgroups),
                    chosen=plgpu.SMEM((self._config.top_k, WARPGROUP_ROWS), jnp.float32),
                )
            ],
            grid=(num_tiles,),
            grid_names=("tile",),
            num_threads=warpgroups,
            thread_name="warpgroup",
            kernel_name="route",
            interpret=self._interpret,
        )
        logits_TE = jnp.pad(logits_TE, ((0, -num_tokens % min(num_tokens, WARPGROUP_ROWS)), (0, 0)))
        stack, layer = (None, None) if correction is None else correction
        id_TU, weight_TU = kernel(_Operands(logits_TE, stack, None if layer is None else layer[None]))
        return Routing(id_TU[:num_tokens], weight_TU[:num_tokens])


class _Operands(NamedTuple):
    logits_TE: Any
    correction_LE: Any
    layer_1: Any


class _Scratch(NamedTuple):
    """Shared memory.

    Attributes:
        logits: [W, m, p].
        arrived: barriers: a warpgroup's logits are there.
        told: what the warpgroups tell each other, [2, number, W, m]; they use both halves in turn.
        all_told: barrier: every warpgroup has written its part of `told`.
        chosen: scores of the chosen experts, [U, m].
    """

    logits: Any
    arrived: Any
    told: Any
    all_told: Any
    chosen: Any


class _Team:
    """The exchange of numbers between warpgroups."""

    def __init__(self, scratch: _Scratch) -> None:
        self._scratch = scratch
        self._round = 0
        self.part_size = scratch.logits.shape[2]

    def tell(self, *arrays_m: jax.Array) -> list[list[jax.Array]]:
        """Return the f32 arrays [m] of all warpgroups, by array."""
        # A half is written again two rounds later, when every warpgroup has read it.
        told, self._round = self._scratch.told.at[self._round % 2], self._round + 1
        for index, array_m in enumerate(arrays_m):
            plgpu.store(told.at[index, lax.axis_index("warpgroup")], array_m, optimized=False)
        arrive_and_wait(self._scratch.all_told)
        return [
            [_load(told.at[index, other], ROWS) for other in range(told.shape[1])] for index in range(len(arrays_m))
        ]


def _choose(
    operands: _Operands, id_TU: Any, weight_TU: Any, scratch: _Scratch, *, config: RouterConfig, size: int
) -> None:
    tile, warpgroup = lax.axis_index("tile"), lax.axis_index("warpgroup")
    rows = min(operands.logits_TE.shape[0], WARPGROUP_ROWS)
    own, arrived = pl.ds(warpgroup * size, size), scratch.arrived.at[warpgroup]
    source = operands.logits_TE.at[pl.ds(tile * rows, rows), own]
    plgpu.copy_gmem_to_smem(source, scratch.logits.at[warpgroup, pl.ds(0, rows)], arrived)
    plgpu.barrier_wait(arrived)
    team = _Team(scratch)
    logits_mp = _load(scratch.logits.at[warpgroup], MATRIX)
    score = _make_score(logits_mp, config, team)
    ranked_mp = score(logits_mp)
    if operands.correction_LE is not None:
        correction_E = operands.correction_LE.at[operands.layer_1[0]]
        correction_p = _load(correction_E.at[own], MATRIX.reduce(0))
        ranked_mp = ranked_mp + lax.broadcast_in_dim(correction_p, ranked_mp.shape, [1])
    if config.top_groups < config.num_groups:
        ranked_mp = _keep_best_groups(ranked_mp, config, team)
    at = pl.ds(tile * WARPGROUP_ROWS, WARPGROUP_ROWS)
    for index in range(config.top_k):
        best_m, id_m = _best(ranked_mp)
        if operands.correction_LE is not None:
            # The weight is without the correction.
            logits_mp = _load(scratch.logits.at[warpgroup], MATRIX)
            logit_m = jnp.sum(jnp.where(_is(id_m, size), logits_mp, jnp.zeros_like(logits_mp)), axis=1)
            score_m, id_m = _best_of_all(best_m, id_m, team, score(logit_m))
        else:
            score_m, id_m = _best_of_all(best_m, id_m, team)
        ranked_mp = jnp.where(_is(id_m - warpgroup * size, size), -jnp.inf, ranked_mp)

        @pl.when(warpgroup == 0)
        def _write(index: int = index, id_m: jax.Array = id_m, score_m: jax.Array = score_m) -> None:
            plgpu.store(id_TU.at[at, index], id_m, optimized=False)
            plgpu.store(scratch.chosen.at[index], score_m, optimized=False)

    @pl.when(warpgroup == 0)
    def _finish() -> None:
        scores = [_load(scratch.chosen.at[index], ROWS) for index in range(config.top_k)]
        for index, weight_m in enumerate(_weights(scores, config)):
            plgpu.store(weight_TU.at[at, index], weight_m, optimized=False)


def _load(source: Any, layout: Any) -> jax.Array:
    return plgpu.load(source, layout=layout, optimized=False)


def _make_score(logits_mp: jax.Array, config: RouterConfig, team: _Team) -> Callable[[jax.Array], jax.Array]:
    """Return the function that computes scores from logits, [m, p] or [m]."""
    if config.scores == "softmax_of_chosen":
        return lambda logits: logits
    if config.scores == "sigmoid":
        return lambda logits: 1 / (1 + jnp.exp(-logits))
    max_m = _fold(jnp.maximum, team.tell(jnp.max(logits_mp, axis=1))[0])
    sums = team.tell(jnp.sum(jnp.exp(logits_mp - broadcast_rows(max_m, logits_mp.shape[1])), axis=1))[0]
    sum_m = _fold(jnp.add, sums)

    def softmax(logits: jax.Array) -> jax.Array:
        spread = (lambda x_m: x_m) if logits.ndim == 1 else partial(broadcast_rows, width=logits.shape[1])
        return jnp.exp(logits - spread(max_m)) / spread(sum_m)

    return softmax


def _keep_best_groups(ranked_mp: jax.Array, config: RouterConfig, team: _Team) -> jax.Array:
    """Replace the scores by -inf if this warpgroup's group is none of the token's best."""
    best_m, id_m = _best(ranked_mp)
    if config.group_scores == 2:
        best_m += jnp.max(jnp.where(_is(id_m, ranked_mp.shape[1]), -jnp.inf, ranked_mp), axis=1)
    own = lax.axis_index("warpgroup")
    better: list[jax.Array] = []
    for other, sum_m in enumerate(team.tell(best_m)[0]):
        before = lax.broadcast_in_dim((other < own).astype(jnp.int32), sum_m.shape, ())
        tie_m = jnp.where(sum_m == best_m, plgpu.layout_cast(before, ROWS), 0)
        better.append(jnp.where(sum_m > best_m, 1, tie_m))
    rank_m = _fold(jnp.add, better)
    return jnp.where(broadcast_rows(rank_m, ranked_mp.shape[1]) < config.top_groups, ranked_mp, -jnp.inf)


def _best_of_all(
    best_m: jax.Array, id_m: jax.Array, team: _Team, score_m: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return the score and the index of each row's best expert, from those of the warpgroups.

    Args:
        best_m: the score by which this warpgroup's best expert was found.
        id_m: its index within the part; the lowest index of equal scores is returned.
        team: the other warpgroups.
        score_m: the score to return, if it is not `best_m`.
    """
    scores = () if score_m is None else (score_m,)
    bests, ids, *others = team.tell(best_m, id_m.astype(jnp.float32), *scores)
    returned = others[0] if others else bests
    size, best_m, id_m, score_m = team.part_size, bests[0], ids[0], returned[0]
    for other in range(1, len(bests)):
        is_better_m = bests[other] > best_m
        best_m = jnp.where(is_better_m, bests[other], best_m)
        id_m = jnp.where(is_better_m, ids[other] + float(other * size), id_m)
        score_m = jnp.where(is_better_m, returned[other], score_m)
    return score_m, id_m.astype(jnp.int32)


def _best(ranked_mp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the best score of each row and its index within the part, i32; the lowest one of equal scores."""
    size = ranked_mp.shape[1]
    best_m = jnp.max(ranked_mp, axis=1)
    # The maximum of the negative index, because integers are reduced only to sums and maxima.
    candidates_mp = jnp.where(ranked_mp == broadcast_rows(best_m, size), -_indices(size), 1 - size)
    return best_m, -jnp.max(candidates_mp, axis=1)


def _weights(scores: list[jax.Array], config: RouterConfig) -> list[jax.Array]:
    """Return the weights of the experts' outputs, from the scores of a token's experts."""
    if config.scores == "softmax_of_chosen":
        scores = [jnp.exp(score_m - scores[0]) for score_m in scores]
    if config.normalize or config.scores == "softmax_of_chosen":
        sum_m = jnp.maximum(_fold(jnp.add, scores), SMALLEST_SUM)
        scores = [score_m / sum_m for score_m in scores]
    return [score_m * config.scale for score_m in scores]


def _indices(size: int) -> jax.Array:
    """Return the index of each expert within the part, i32[m, p]."""
    return plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS, size), 1, layout=MATRIX)


def _is(id_m: jax.Array, size: int) -> jax.Array:
    """Return whether an expert is the one with its row's index within the part, bool[m, p]."""
    return _indices(size) == broadcast_rows(id_m, size)


def _fold(function: Callable[[jax.Array, jax.Array], jax.Array], arrays: Sequence[jax.Array]) -> jax.Array:
    return reduce(function, arrays)
