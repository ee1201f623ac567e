"""Transfers of arrays to the devices."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

T = TypeVar("T")


def to_devices(arrays: T, sharding: NamedSharding) -> T:
    """Send a tree of arrays to the devices; every host passes the whole arrays."""
    if not sharding.mesh.is_multi_process:
        return jax.device_put(arrays, sharding)  # one call for the whole tree
    return jax.tree.map(lambda array: put(array, sharding), arrays)


def put(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """Send an array to the devices; every host passes the whole array and sends its own devices' shards."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def zeros(shapes: Any) -> Any:
    """Return zeros on the devices for a tree of `jax.ShapeDtypeStruct`s with shardings."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)
