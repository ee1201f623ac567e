"""A step's masks and lists as a kernel wants them: laid out anew by XLA, so that the kernel only shifts and compares.

Dimension key: B rows of logits, T tiles of a shard's ids, P ids of a tile, Q words of 32 tiles, J entries of a list, C
chunks.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.sampling.api import MASK_BITS


def mask_words_from(mask_BW: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """u32[B, count] words of a mask, the first bit that of id `first`, wherever in a word it is; zeros past the end."""
    words_BW = lax.bitcast_convert_type(mask_BW, jnp.uint32)
    words_BW = jnp.pad(words_BW, ((0, 0), (0, count + 1)))
    start, shift = first // MASK_BITS, (first % MASK_BITS).astype(jnp.uint32)
    words_BW = lax.dynamic_slice_in_dim(words_BW, start, count + 1, axis=1)
    low_BW, high_BW = words_BW[:, :-1] >> shift, words_BW[:, 1:] << (MASK_BITS - shift)
    # A shift by all 32 bits means nothing.
    return low_BW | jnp.where(shift == 0, jnp.uint32(0), high_BW)


def bit_planes(words_BTG: jax.Array) -> jax.Array:
    """i32[B, Q, P] from u32: bit t of word (q, p) is bit p of tile 32 q + t; tiles past the end are forbidden.

    Each 32 words are a 32 x 32 matrix of bits that is transposed by halves: 5 steps on arrays of the mask's own size.
    """
    rows, tiles, groups = words_BTG.shape
    padded = jnp.pad(words_BTG, ((0, 0), (0, -tiles % MASK_BITS), (0, 0)))
    x = padded.reshape(rows, -1, MASK_BITS, groups)
    distance = MASK_BITS // 2
    while distance:
        even_halves = jnp.uint32(0xFFFFFFFF // (2**distance + 1))
        pairs = x.reshape(rows, -1, MASK_BITS // (2 * distance), 2, distance, groups)
        first, second = pairs[:, :, :, 0], pairs[:, :, :, 1]
        moved = ((first >> jnp.uint32(distance)) ^ second) & even_halves
        pairs = jnp.stack([first ^ (moved << jnp.uint32(distance)), second ^ moved], axis=3)
        x = pairs.reshape(rows, -1, MASK_BITS, groups)
        distance //= 2
    planes = x.swapaxes(2, 3).reshape(rows, -1, groups * MASK_BITS)
    return lax.bitcast_convert_type(planes, jnp.int32)


def sorted_lists(
    ids_BJ: jax.Array, values_BJ: jax.Array, chunk: int, num_chunks: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lists in order of id, and i32[B, C + 1]: where the entries of each chunk of ids begin."""
    ids_BJ, values_BJ = lax.sort((ids_BJ, values_BJ), dimension=1, num_keys=1)
    starts_C = jnp.arange(num_chunks + 1, dtype=jnp.int32) * chunk
    begin_BC = jnp.sum(ids_BJ[:, None, :] < starts_C[None, :, None], axis=2, dtype=jnp.int32)
    return ids_BJ, values_BJ, begin_BC
