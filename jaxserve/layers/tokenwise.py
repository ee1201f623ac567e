"""Ops that treat each token independently, run on all tokens together or in tiles of a fixed shape.

A row of a matrix product rounds differently in a batch of 8 and of 64, because XLA picks its loops by shape. In
tiles, the shapes are the same whatever the size of a step, so a token's result does not depend on the other tokens.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

_TILE = 16


class Tokenwise(Protocol):
    """Applies functions to arrays whose leading axis is tokens."""

    def __call__(self, function: Callable[..., Any], *arrays: jax.Array, shared: tuple[Any, ...] = ()) -> Any:
        """Call `function` with the shared results, then the arrays, as positional arguments.

        Args:
            function: function of any number of tokens.
            arrays: arrays of all tokens.
            shared: results of `prepare`.
        """
        ...

    def prepare(self, function: Callable[..., Any], *arrays: jax.Array) -> Any:
        """Compute results that several calls share for the tokens that are processed together; any pytree."""
        ...


class WholeBatch:
    """Processes all tokens together."""

    def __call__(self, function: Callable[..., Any], *arrays: jax.Array, shared: tuple[Any, ...] = ()) -> Any:
        """See `Tokenwise`."""
        return function(*shared, *arrays)

    def prepare(self, function: Callable[..., Any], *arrays: jax.Array) -> Any:
        """See `Tokenwise`."""
        return function(*arrays)


class Tiled:
    """Processes tiles of 16 tokens, one after the other; the last tile is padded with zeros."""

    def __call__(self, function: Callable[..., Any], *arrays: jax.Array, shared: tuple[Any, ...] = ()) -> Any:
        """See `Tokenwise`."""
        out = lax.map(lambda tile: function(*tile), (*shared, *map(_tiles, arrays)))
        return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[: arrays[0].shape[0]], out)

    def prepare(self, function: Callable[..., Any], *arrays: jax.Array) -> Any:
        """See `Tokenwise`; the tiles' results are stacked along a new leading axis."""
        return lax.map(lambda tile: function(*tile), tuple(map(_tiles, arrays)))


def _tiles(array: jax.Array) -> jax.Array:
    array = jnp.pad(array, ((0, -array.shape[0] % _TILE), *((0, 0),) * (array.ndim - 1)))
    return array.reshape(-1, _TILE, *array.shape[1:])
