"""The weights of a model by their paths in its tree: shapes, dtypes and logical axes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.layers.linear import Axes, Stored
from jaxserve.parallel.mesh import named_sharding

Weights: TypeAlias = dict[str, Any]
Path: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class ParamSpec:
    """One weight of the tree.

    Attributes:
        shape: with the layers that have such a weight along axis 0.
        dtype: of its values.
        axes: logical ones.
        layers: their numbers, in order; empty for what no layer has.
        in_stack: a layer gets it as `InStack`.
        taken_apart: no linear map by itself.
        stored: of a quantised weight, and of what its blocks have.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: Axes
    layers: tuple[int, ...] = ()
    in_stack: bool = False
    taken_apart: bool = False
    stored: Stored | None = None

    @property
    def stacked(self) -> bool:
        """Whether axis 0 is layers."""
        return bool(self.layers)

    @property
    def num_inputs(self) -> int:
        """Of a matrix, however it is stored."""
        return self.shape[-1] * (self.stored or Stored()).per_byte

    def shard_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """As one device has it."""
        return named_sharding(self.axes, self.shape, mesh).shard_shape(self.shape)

    def shard_bytes(self, mesh: Mesh) -> int:
        """On one device."""
        return math.prod(self.shard_shape(mesh)) * self.dtype.itemsize

    @property
    def of_experts(self) -> bool:
        """Whether the first axis after that is experts."""
        return self.axes[self.stacked : self.stacked + 1] in (("experts",), ("experts_shared",))


def tree_of(leaves: Iterable[tuple[Path, Any]]) -> Weights:
    """Nested dicts from paths."""
    tree: Weights = {}
    for path, leaf in leaves:
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree
