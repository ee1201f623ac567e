"""Sizes of the attention kernels' tiles, and what they cost in shared memory."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from kernels_pallas.warpgroup import WARPGROUP_ROWS

# What a thread block may use on Hopper.
HOPPER_SMEM_BYTES = 232_448
# Shared memory is handed out in multiples of this.
_ALIGNMENT = 1024
# What barriers and alignment take at most.
_OVERHEAD = 2048


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How one thread block works.

    Attributes:
        warpgroups: that compute, 64 rows of queries each.
        keys: per step.
        stages: steps whose keys and values are in shared memory at a time.
        width: of a product of weights and values; wider ones are cut, or their results would not fit the registers.
        interpretable: keep to what the interpreter can do. It takes the operands of products from shared memory and
            cannot go on with an accumulator; the device does better with registers.
    """

    warpgroups: int
    keys: int
    stages: int
    width: int
    interpretable: bool = False

    @property
    def rows(self) -> int:
        """Query rows of the thread block."""
        return self.warpgroups * WARPGROUP_ROWS

    def parts(self, head_dim: int) -> list[slice]:
        """The head dim cut to `width`."""
        return [slice(start, start + self.width) for start in range(0, head_dim, self.width)]

    def smem_bytes(self, head_dim: int, cache_dtype: Any, *, decode: bool) -> int:
        """Bytes of shared memory: queries, stages, converted keys and values, weights and results."""
        itemsize = jnp.dtype(cache_dtype).itemsize
        total = self.rows * head_dim * 2 + 2 * self.stages * self.keys * head_dim * itemsize
        if itemsize == 1:
            total += 2 * self.keys * head_dim * 2
        if self.interpretable:
            total += self.rows * self.keys * 2
        if decode:
            total += self.rows * self.width * 4 + 2 * _ALIGNMENT
        return total + _OVERHEAD


# By head dim, with the most stages that are of use.
_DECODE = {
    64: Tile(warpgroups=1, keys=64, stages=4, width=64),
    80: Tile(warpgroups=1, keys=64, stages=4, width=80),
    96: Tile(warpgroups=1, keys=64, stages=4, width=96),
    128: Tile(warpgroups=1, keys=64, stages=4, width=64),
    256: Tile(warpgroups=1, keys=64, stages=4, width=128),
}
_PREFILL = {
    64: Tile(warpgroups=2, keys=128, stages=3, width=64),
    80: Tile(warpgroups=2, keys=128, stages=3, width=80),
    96: Tile(warpgroups=2, keys=128, stages=3, width=96),
    128: Tile(warpgroups=2, keys=128, stages=3, width=128),
    256: Tile(warpgroups=2, keys=64, stages=3, width=256),
}
_MIN_STAGES = 2


def choose_tile(head_dim: int, cache_dtype: Any, *, decode: bool, smem_bytes: int = HOPPER_SMEM_BYTES) -> Tile:
    """The tile for a head dim, with as many stages as fit.

    Decode aims at two thread blocks per multiprocessor: one computes, starts or ends while the other loads.

    Args:
        head_dim: of keys and values.
        cache_dtype: their dtype.
        decode: for rows that run one token, or for the others.
        smem_bytes: shared memory that a thread block may use.

    Raises:
        NotImplementedError: no tile for the head dim, or none that fits.
    """
    table = _DECODE if decode else _PREFILL
    if head_dim not in table:
        raise NotImplementedError(f"head dim {head_dim}: the GPU kernels know {sorted(table)}")
    largest = table[head_dim]
    tiles = [replace(largest, stages=stages) for stages in range(largest.stages, _MIN_STAGES - 1, -1)]
    for limit in (smem_bytes // 2, smem_bytes) if decode else (smem_bytes,):
        for tile in tiles:
            if tile.smem_bytes(head_dim, cache_dtype, decode=decode) <= limit:
                return tile
    need = tiles[-1].smem_bytes(head_dim, cache_dtype, decode=decode)
    raise NotImplementedError(f"head dim {head_dim} needs {need} bytes of shared memory, the device has {smem_bytes}")
