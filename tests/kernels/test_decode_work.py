"""The work of GPU decode steps is spread over the device, whatever the lengths of the rows; no kernel runs."""

import heapq
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.paged_attention.cases import Case

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")

NUM_CORES, BLOCKS_PER_CORE = 132, 2


def plan(kv_lens: list[int], num_rows: int, num_kv_heads: int, window: int | None = None) -> tuple[Any, Any]:
    """Return the work of a step, as arrays, and the tile."""
    from kernels_pallas.paged_attention.gpu.tile import choose_tile
    from kernels_pallas.paged_attention.gpu.work import plan_decode

    config = Case(q_lens=(), kv_lens=(), page_size=64, heads=(32, 8, 128), window=window).config(jnp.bfloat16)
    tile = choose_tile(config, decode=True)
    kv_lens_B = jnp.asarray([*kv_lens, *[0] * (num_rows - len(kv_lens))], jnp.int32)
    work = plan_decode(config, tile, kv_lens_B, len(kv_lens), num_kv_heads=num_kv_heads, num_cores=NUM_CORES)
    return jax.device_get(work), tile


def blocks_of_cores(kv_lens: list[int], num_rows: int, num_kv_heads: int) -> np.ndarray:
    """Return the key blocks that each SM attends if a thread block starts wherever one ends first."""
    work, _ = plan(kv_lens, num_rows, num_kv_heads)
    slots = [(0, slot) for slot in range(NUM_CORES * BLOCKS_PER_CORE)]
    total = np.zeros(NUM_CORES, int)
    for item in range(int(work.end_B[-1])):
        size = int(work.end_W[item] - work.first_W[item])
        for _ in range(num_kv_heads):
            ends, slot = heapq.heappop(slots)
            heapq.heappush(slots, (ends + size, slot))
            total[slot % NUM_CORES] += size
    return total


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("place", [0, 128, 255])
def test_one_long_row_among_short_ones(place: int, num_kv_heads: int) -> None:
    kv_lens = [200] * 256
    kv_lens[place] = 100_000
    blocks = blocks_of_cores(kv_lens, 256, num_kv_heads)
    assert blocks.max() <= 1.25 * blocks.mean()


@pytest.mark.parametrize(("kv_len", "num_kv_heads"), [(2048, 8), (16384, 1), (100_000, 2), (100_000, 8)])
def test_one_row_keeps_the_device_busy(kv_len: int, num_kv_heads: int) -> None:
    blocks = blocks_of_cores([kv_len], 8, num_kv_heads)
    assert np.count_nonzero(blocks) >= 0.9 * NUM_CORES


@pytest.mark.parametrize("window", [None, 100, 1024])
@pytest.mark.parametrize("kv_lens", [[1], [64, 65, 5000], [3000] * 7 + [1], []])
def test_items_are_the_visible_blocks_of_the_rows_in_order(kv_lens: list[int], window: int | None) -> None:
    work, tile = plan(kv_lens, 8, 2, window)
    items = [
        (int(work.row_W[item]), block)
        for item in range(int(work.end_B[-1]))
        for block in range(int(work.first_W[item]), int(work.end_W[item]))
    ]
    first = [0 if window is None else max(kv_len - window, 0) // tile.keys for kv_len in kv_lens]
    assert items == [
        (row, block) for row, kv_len in enumerate(kv_lens) for block in range(first[row], -(-kv_len // tile.keys))
    ]
    assert len(work.row_W) >= work.end_B[-1]
    ends = np.concatenate([[0], work.end_B])
    for row, (begin, end) in enumerate(pairwise(ends)):
        assert (work.row_W[begin:end] == row).all()
