"""Arrays that come to the devices."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

T = TypeVar("T")


def to_devices(arrays: T, sharding: NamedSharding) -> T:
    """Send a tree of arrays, which every host has whole."""
    if not sharding.mesh.is_multi_process:
        return jax.device_put(arrays, sharding)  # all at once
    return jax.tree.map(lambda array: put(array, sharding), arrays)


def put(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """Every host has the whole array and sends what its own devices hold."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def zeros(shapes: Any) -> Any:
    """A tree of zeros on the devices, of `jax.ShapeDtypeStruct`s with shardings."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)
