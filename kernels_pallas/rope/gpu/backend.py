"""Rotary position embedding on NVIDIA GPUs: a kernel in which a thread block handles up to 64 heads of one token.

Its heads are queries followed by keys. XLA would need a launch for each, and one more for the weight of each norm.

Dimension key: as in `api`; m the 64 rows of a warpgroup, of which each has a head.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.rope.api import Angles, HeadNorms
from kernels_pallas.rope.xla.backend import rope
from kernels_pallas.shards import MODEL, model_size, over_model
from kernels_pallas.warpgroup import MATRIX, WARPGROUP_ROWS, broadcast_rows

# Columns of a tile of the register layout.
_COLUMNS = 8
# A thread block computes 64 rows, however few heads there are: for more tokens, XLA's launches cost less.
_MAX_TOKENS = 256
# TMA reads and writes shared memory at multiples of this many bytes.
_ALIGNMENT = 128
# Half of a head must fit into the registers of its threads, twice.
_MAX_PAIRS = 128


class GpuRope:
    """A `Rope`.

    Args:
        mesh: the devices over which the heads are split.
        interpret: parameters of the GPU interpret mode, or False to compile.
    """

    def __init__(self, mesh: Mesh, interpret: Any = False) -> None:
        self._mesh, self._interpret = mesh, interpret

    def __call__(
        self, q_TNH: jax.Array, k_TKH: jax.Array, angles: Angles, norms: HeadNorms | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """See `Rope`."""
        num_pairs = q_TNH.shape[2] // 2
        if (
            num_pairs % _COLUMNS
            or num_pairs > _MAX_PAIRS
            or q_TNH.dtype != jnp.bfloat16
            or q_TNH.shape[0] > _MAX_TOKENS
            or not self._is_aligned(q_TNH, k_TKH)
        ):
            return rope(q_TNH, k_TKH, angles, norms)
        constants = None if norms is None else _Constants(*((norm.eps, norm.offset) for norm in norms))
        stacks = None if norms is None else tuple(norm.weight for norm in norms)
        heads = P(None, MODEL, None)

        def run(q_TNH: jax.Array, k_TKH: jax.Array, angles: Angles, stacks: Any) -> tuple[jax.Array, jax.Array]:
            weights = () if stacks is None else tuple((stack, layer[None]) for stack, layer in stacks)
            return self._rotate(_Operands((q_TNH, k_TKH), angles, weights), constants)

        return over_model(run, self._mesh, (heads, heads, P(), P()), (heads, heads))(q_TNH, k_TKH, angles, stacks)

    def _is_aligned(self, q_TNH: jax.Array, k_TKH: jax.Array) -> bool:
        """Return whether TMA can copy the heads to and from their rows in shared memory."""
        size = model_size(self._mesh)
        tiles = _tiles(q_TNH.shape[1] // size, k_TKH.shape[1] // size)
        head_bytes = q_TNH.shape[2] * q_TNH.dtype.itemsize
        return all(heads.row * head_bytes % _ALIGNMENT == 0 for tile in tiles for heads in tile)

    def _rotate(self, operands: "_Operands", constants: "_Constants | None") -> tuple[jax.Array, jax.Array]:
        (num_tokens, num_q_heads, head_dim), num_kv_heads = operands.heads[0].shape, operands.heads[1].shape[1]
        tiles = _tiles(num_q_heads, num_kv_heads)
        # Every call needs a new function: a function that is reused with another grid keeps its first trace.
        kernel = plgpu.kernel(
            partial(_rotate_heads, tiles=tiles, constants=constants),
            out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands.heads],
            scratch_types=[
                plgpu.SMEM((WARPGROUP_ROWS, head_dim), operands.heads[0].dtype),
                [plgpu.Barrier(num_arrivals=len(tile)) for tile in tiles],
            ],
            grid=(num_tokens, len(tiles)),
            grid_names=("token", "tile"),
            kernel_name="rope",
            interpret=self._interpret,
        )
        q_TNH, k_TKH = kernel(operands)
        return q_TNH, k_TKH


class _Constants(NamedTuple):
    """Epsilon and offset of the norms of queries and keys."""

    query: tuple[float, float]
    key: tuple[float, float]


class _Operands(NamedTuple):
    """Operands in global memory.

    Attributes:
        heads: queries and keys, [T, N, H] and [T, K, H].
        angles: see `Angles`.
        norms: weights of their norms, [L, H] with the layer [1]; empty without norms.
    """

    heads: tuple[Any, Any]
    angles: Any
    norms: tuple[tuple[Any, Any], ...]


class _Heads(NamedTuple):
    """Heads that a thread block copies: of queries (0) or keys (1), from `first` on, to rows from `row` on."""

    kind: int
    first: int
    row: int
    number: int


def _tiles(num_q_heads: int, num_kv_heads: int) -> list[list[_Heads]]:
    """Return the heads of each thread block: queries followed by keys, 64 heads at a time."""
    tiles: list[list[_Heads]] = []
    for start in range(0, num_q_heads + num_kv_heads, WARPGROUP_ROWS):
        end, tile = min(start + WARPGROUP_ROWS, num_q_heads + num_kv_heads), list[_Heads]()
        for kind, (first, last) in enumerate(((0, num_q_heads), (num_q_heads, num_q_heads + num_kv_heads))):
            low, high = max(start, first), min(end, last)
            if low < high:
                tile.append(_Heads(kind, low - first, low - start, high - low))
        tiles.append(tile)
    return tiles


def _rotate_heads(
    operands: _Operands,
    q_TNH: Any,
    k_TKH: Any,
    buffer_mH: Any,
    arrived: Sequence[Any],
    *,
    tiles: Sequence[Sequence[_Heads]],
    constants: _Constants | None,
) -> None:
    for index, tile in enumerate(tiles):
        run = partial(_rotate_tile, operands, (q_TNH, k_TKH), buffer_mH, arrived[index], tile, constants)
        if len(tiles) == 1:
            run()
        else:
            pl.when(lax.axis_index("tile") == index)(run)


def _rotate_tile(
    operands: _Operands,
    outs: tuple[Any, Any],
    buffer_mH: Any,
    arrived: Any,
    tile: Sequence[_Heads],
    constants: _Constants | None,
) -> None:
    token, num_pairs = lax.axis_index("token"), buffer_mH.shape[1] // 2
    for heads in tile:
        source = operands.heads[heads.kind].at[token, heads.first : heads.first + heads.number]
        plgpu.copy_gmem_to_smem(source, buffer_mH.at[heads.row : heads.row + heads.number], arrived)
    plgpu.barrier_wait(arrived)
    halves = slice(0, num_pairs), slice(num_pairs, 2 * num_pairs)
    first, second = (plgpu.load(buffer_mH.at[:, half], layout=MATRIX, optimized=False) for half in halves)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    if constants is not None:
        first, second = _normalize((first, second), halves, operands, tile, constants)
    cos, sin = (
        lax.broadcast_in_dim(plgpu.load(each.at[token], layout=MATRIX.reduce(0), optimized=False), first.shape, [1])
        for each in operands.angles
    )
    rotated = first * cos - second * sin, second * cos + first * sin
    for half, values in zip(halves, rotated, strict=True):
        plgpu.store(buffer_mH.at[:, half], values.astype(buffer_mH.dtype), optimized=False)
    plgpu.commit_smem()
    for heads in tile:
        target = outs[heads.kind].at[token, heads.first : heads.first + heads.number]
        plgpu.copy_smem_to_gmem(buffer_mH.at[heads.row : heads.row + heads.number], target)
    plgpu.wait_smem_to_gmem(0)


def _normalize(
    values: tuple[jax.Array, jax.Array],
    halves: tuple[slice, slice],
    operands: _Operands,
    tile: Sequence[_Heads],
    constants: _Constants,
) -> tuple[jax.Array, jax.Array]:
    """Normalise each head; the rows of queries and of keys have different weights."""
    shape = values[0].shape
    squares = [jnp.sum(each * each, axis=1) for each in values]
    mean_m = (squares[0] + squares[1]) / (2 * shape[1])
    results: list[jax.Array] = []
    for each, half in zip(values, halves, strict=True):
        normalized = each
        for heads in tile:
            eps, offset = constants[heads.kind]
            stack, layer_1 = operands.norms[heads.kind]
            weight_C = plgpu.load(stack.at[layer_1[0], half], layout=MATRIX.reduce(0), optimized=False)
            weight = lax.broadcast_in_dim(weight_C.astype(jnp.float32) + offset, shape, [1])
            scaled = each * broadcast_rows(lax.rsqrt(mean_m + eps), shape[1]) * weight
            is_own = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX) >= heads.row
            normalized = scaled if heads.row == 0 else jnp.where(is_own, scaled, normalized)
        results.append(normalized.astype(operands.heads[0].dtype).astype(jnp.float32))
    return results[0], results[1]
