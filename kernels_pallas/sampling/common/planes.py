"""A step's masks and lists in the layout of the kernels: XLA rearranges them, so a kernel only shifts and compares.

Dimension key: B rows of logits, T tiles of a shard's ids, P ids of a tile, Q words of 32 tiles, J entries of a list, C
chunks.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.sampling.api import MASK_BITS


def mask_words_from(mask_BW: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """Return u32[B, count] mask words that start with the bit of id `first`, at any offset; zeros past the end."""
    words_BW = lax.bitcast_convert_type(mask_BW, jnp.uint32)
    words_BW = jnp.pad(words_BW, ((0, 0), (0, count + 1)))
    start, shift = first // MASK_BITS, (first % MASK_BITS).astype(jnp.uint32)
    words_BW = lax.dynamic_slice_in_dim(words_BW, start, count + 1, axis=1)
    low_BW, high_BW = words_BW[:, :-1] >> shift, words_BW[:, 1:] << (MASK_BITS - shift)
    # A shift by all 32 bits is undefined.
    return low_BW | jnp.where(shift == 0, jnp.uint32(0), high_BW)


def bit_planes(words_BTG: jax.Array) -> jax.Array:
    """Transpose u32 mask words to i32[B, Q, P]: bit t of word (q, p) is bit p of tile 32 q + t.

    Tiles past the end are forbidden. Each 32 words are a 32 x 32 bit matrix, which is transposed by halves: 5 steps on
    arrays of the mask's size.
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
    """Sort lists by id; also return the index at which the entries of each chunk of ids begin, i32[B, C + 1]."""
    ids_BJ, values_BJ = lax.sort((ids_BJ, values_BJ), dimension=1, num_keys=1)
    starts_C = jnp.arange(num_chunks + 1, dtype=jnp.int32) * chunk
    begin_BC = jnp.sum(ids_BJ[:, None, :] < starts_C[None, :, None], axis=2, dtype=jnp.int32)
    return ids_BJ, values_BJ, begin_BC
