"""LoRA matmuls by kernels that each run on one device's shard.

Dimension key: T tokens, L layers, S slots, X = L * S, R rank, I inputs, O outputs, J = modules with the same
inputs * R.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.shards import MODEL, over_model
from kernels_pallas.stacked import Stacked


class Kernels(NamedTuple):
    """The functions that run on one device.

    Attributes:
        plan: (slot_T, num_slots) -> a tree of arrays.
        shrink: (x_TI, a, plan) -> f32[T, J].
        expand: (h_TJ, b, plan, member) -> [T, O] in h's dtype.
    """

    plan: Callable[[jax.Array, int], Any]
    shrink: Callable[[jax.Array, Stacked, Any], jax.Array]
    expand: Callable[[jax.Array, Stacked, Any, int], jax.Array]


class ShardedLora:
    """A `LoraMatmul` that runs kernels on the shards of a mesh.

    Args:
        kernels: kernels of one device.
        mesh: mesh of the devices.
    """

    def __init__(self, kernels: Kernels, mesh: Mesh) -> None:
        self._kernels = kernels
        self._mesh = mesh

    def plan(self, slot_T: jax.Array, num_slots: int) -> Any:
        """See `LoraMatmul`."""
        return self._kernels.plan(slot_T, num_slots)

    def shrink(self, x_TI: jax.Array, a: Stacked, plan: Any, *, split: bool) -> jax.Array:
        """See `LoraMatmul`; returns [T, J]."""
        axis = MODEL if split else None

        def run(x_TI: jax.Array, a: Stacked, plan: Any) -> jax.Array:
            h_TJ = self._kernels.shrink(x_TI, a, plan)
            return (lax.psum(h_TJ, axis) if axis else h_TJ).astype(x_TI.dtype)

        return over_model(run, self._mesh, (P(None, axis), _matrix_specs(axis), P()), P())(x_TI, a, plan)

    def expand(self, h: jax.Array, b: Stacked, plan: Any, *, member: int, split: bool) -> jax.Array:
        """See `LoraMatmul`."""
        axis = MODEL if split else None

        def run(h_TJ: jax.Array, b: Stacked, plan: Any) -> jax.Array:
            return self._kernels.expand(h_TJ, b, plan, member)

        return over_model(run, self._mesh, (P(), _matrix_specs(axis), P()), P(None, axis))(h, b, plan)


def _matrix_specs(axis: Any) -> Any:
    """Return the specs of LoRA matrices whose last axis is split over `axis`."""
    return Stacked(P(None, None, None, axis), P())  # pyright: ignore[reportArgumentType]  # specs instead of arrays
