"""Tile sizes of the GPU attention kernels, and the shared memory that tiles need."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from kernels_pallas.paged_attention.api import AttentionConfig
from kernels_pallas.warpgroup import WARPGROUP_ROWS

# Maximum shared memory of a thread block on Hopper.
HOPPER_SMEM_BYTES = 232_448
# Shared memory is allocated in multiples of this.
_ALIGNMENT = 1024
# Upper bound of the memory for barriers and alignment.
_OVERHEAD = 2048


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The tile of one thread block.

    Attributes:
        warpgroups: number of compute warpgroups, with 64 query rows each unless they share rows.
        keys: keys per step.
        stages: pipeline stages: steps whose keys and values are in shared memory at the same time.
        width: columns of a product of weights and values; wider values are split to keep results in registers.
        shares_rows: whether the warpgroups share the same 64 query rows and compute an equal part of the values'
            columns each, because the registers of one warpgroup could not hold all columns.
        interpretable: whether to use only what the interpreter supports. It reads operands of products from shared
            memory and cannot continue an accumulator; on the device, registers are faster.
    """

    warpgroups: int
    keys: int
    stages: int
    width: int
    shares_rows: bool = False
    interpretable: bool = False

    @property
    def rows(self) -> int:
        """Query rows of the thread block."""
        return self.bands * WARPGROUP_ROWS

    @property
    def bands(self) -> int:
        """Number of bands of 64 query rows."""
        return 1 if self.shares_rows else self.warpgroups

    def parts(self, value_dim: int, warpgroup: Any) -> list[slice]:
        """Return a warpgroup's columns of the values in slices of `width`; its index matters only with shared rows."""
        columns = value_dim // self.warpgroups if self.shares_rows else value_dim
        first = warpgroup * columns if self.shares_rows else 0
        return [slice(start, start + self.width) for start in range(first, first + columns, self.width)]

    def smem_bytes(self, config: AttentionConfig, *, decode: bool) -> int:
        """Return the bytes of shared memory: queries, stages, converted keys and values, and outputs.

        Where values are part of the keys, outputs overwrite the queries, since a buffer of their own would not fit.
        """
        itemsize = jnp.dtype(config.dtype).itemsize
        step = self.keys * config.head_dim * (2 if config.value_dim is None else 1)
        total = self.rows * config.head_dim * 2 + self.stages * step * itemsize
        if itemsize == 1:
            total += step * 2
        if decode:
            total += 2 * _ALIGNMENT
            if config.value_dim is None:
                total += self.rows * self.width * 4
        return total + _OVERHEAD


# By head dim, with the maximum number of useful stages.
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
# By the dims of keys and of the values that are part of them (MLA), for both kernels.
_LATENT = {(576, 512): Tile(warpgroups=2, keys=64, stages=2, width=256, shares_rows=True)}
_MIN_STAGES = 2
# What may be faster on a device than the formula's choice.
_KEYS, _STAGES = (64, 128), (2, 3, 4, 5, 6)


def choose_tile(config: AttentionConfig, *, decode: bool, smem_bytes: int = HOPPER_SMEM_BYTES) -> Tile:
    """Return the tile for a model's heads, with as many stages as fit.

    Decode aims at two thread blocks per SM: one computes, starts or ends while the other loads.

    Args:
        config: config of the model.
        decode: whether the tile is for rows that run one token or for longer rows.
        smem_bytes: shared memory that a thread block may use.

    Raises:
        NotImplementedError: there is no tile for the head dim, or none fits.
    """
    largest = _largest_tile(config, decode=decode)
    tiles = [replace(largest, stages=stages) for stages in range(largest.stages, _MIN_STAGES - 1, -1)]
    for limit in (smem_bytes // 2, smem_bytes) if decode else (smem_bytes,):
        for tile in tiles:
            if tile.smem_bytes(config, decode=decode) <= limit:
                return tile
    need = tiles[-1].smem_bytes(config, decode=decode)
    raise NotImplementedError(
        f"head dim {config.head_dim} needs {need} bytes of shared memory, the device has {smem_bytes}"
    )


def legal_tiles(config: AttentionConfig, *, decode: bool, smem_bytes: int = HOPPER_SMEM_BYTES) -> list[Tile]:
    """Return the tiles that fit, that of `choose_tile` first; see `choose_tile`."""
    chosen = choose_tile(config, decode=decode, smem_bytes=smem_bytes)
    keys = (chosen.keys,) if config.value_dim is not None else _KEYS
    others = (replace(chosen, keys=each, stages=stages) for each in keys for stages in _STAGES)
    fit = (tile for tile in others if tile.smem_bytes(config, decode=decode) <= smem_bytes)
    return list(dict.fromkeys((chosen, *fit)))


def _largest_tile(config: AttentionConfig, *, decode: bool) -> Tile:
    if config.value_dim is not None:
        dims = (config.head_dim, config.value_dim)
        if dims not in _LATENT:
            raise NotImplementedError(
                f"keys and values of {dims} elements are not supported by the GPU kernels; supported: {sorted(_LATENT)}"
            )
        return _LATENT[dims]
    table = _DECODE if decode else _PREFILL
    if config.head_dim not in table:
        raise NotImplementedError(
            f"head dim {config.head_dim} is not supported by the GPU kernels; supported: {sorted(table)}"
        )
    return table[config.head_dim]
