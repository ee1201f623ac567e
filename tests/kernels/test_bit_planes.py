"""The bit planes that the sampling kernels read hold the token mask, bit by bit, against the unpacked mask in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.sampling.common.planes import bit_planes, mask_words_from


@pytest.mark.parametrize("first", [0, 5, 31, 32, 64, 77])
@pytest.mark.parametrize("tile", [128, 1024])
def test_bits_of_planes(first: int, tile: int) -> None:
    ids = 3 * 32 * tile // 2
    bits = np.random.default_rng(first).integers(0, 2, (2, ids)).astype(bool)
    mask = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    tiles = (ids - 96) // tile
    words = jax.jit(mask_words_from, static_argnums=2)(jnp.asarray(mask), jnp.int32(first), tiles * tile // 32)
    planes = np.asarray(bit_planes(words.reshape(2, tiles, tile // 32)))
    for t in range(tiles):
        want = bits[:, first + t * tile : first + (t + 1) * tile]
        np.testing.assert_array_equal((planes[:, t // 32] >> (t % 32)) & 1, want)
