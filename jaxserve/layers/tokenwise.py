"""Maths on tokens that do not see each other: all at once, or in tiles of one shape.

A row of a matrix product rounds differently in a batch of 8 and of 64, because XLA picks its loops by shape. In
tiles every token meets the same shapes whatever the size of its step, so its result does not depend on the others.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

_TILE = 16


class Tokenwise(Protocol):
    """How functions of arrays whose leading axis is tokens are applied."""

    def __call__(self, function: Callable[..., Any], *arrays: jax.Array, shared: tuple[Any, ...] = ()) -> Any:
        """`function` of what is shared, then of the arrays.

        Args:
            function: function of some tokens.
            arrays: arrays of all tokens.
            shared: results of `prepare`.
        """
        ...

    def prepare(self, function: Callable[..., Any], *arrays: jax.Array) -> Any:
        """What many functions need to know of the tokens that they are applied to together; any tree."""
        ...


class AtOnce:
    """All tokens together."""

    def __call__(self, function: Callable[..., Any], *arrays: jax.Array, shared: tuple[Any, ...] = ()) -> Any:
        """See `Tokenwise`."""
        return function(*shared, *arrays)

    def prepare(self, function: Callable[..., Any], *arrays: jax.Array) -> Any:
        """See `Tokenwise`."""
        return function(*arrays)


class InTiles:
    """In tiles of 16 tokens, one after the other; the last one is padded with zeros."""

    def __call__(self, function: Callable[..., Any], *arrays: jax.Array, shared: tuple[Any, ...] = ()) -> Any:
        """See `Tokenwise`."""
        out = lax.map(lambda tile: function(*tile), (*shared, *map(_tiles, arrays)))
        return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[: arrays[0].shape[0]], out)

    def prepare(self, function: Callable[..., Any], *arrays: jax.Array) -> Any:
        """See `Tokenwise`; what is of a tile lies along a new leading axis."""
        return lax.map(lambda tile: function(*tile), tuple(map(_tiles, arrays)))


def _tiles(array: jax.Array) -> jax.Array:
    array = jnp.pad(array, ((0, -array.shape[0] % _TILE), *((0, 0),) * (array.ndim - 1)))
    return array.reshape(-1, _TILE, *array.shape[1:])
