"""Maths on tokens that do not see each other: all at once, or in tiles of one shape.

A row of a matrix product rounds differently in a batch of 8 and of 64, because XLA picks its loops by shape. In
tiles every token meets the same shapes whatever the size of its step, so its result does not depend on the others.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_TILE = 16


def at_once(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Apply `function` to arrays whose leading axis is tokens."""
    return function(*arrays)


def in_tiles(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """The same in tiles of 16 tokens, one after the other; the last one is padded with zeros."""
    num_tokens = arrays[0].shape[0]
    padding = -num_tokens % _TILE

    def tiles(array: jax.Array) -> jax.Array:
        array = jnp.pad(array, ((0, padding), *((0, 0),) * (array.ndim - 1)))
        return array.reshape(-1, _TILE, *array.shape[1:])

    out = lax.map(lambda tile: function(*tile), tuple(tiles(array) for array in arrays))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:num_tokens], out)
