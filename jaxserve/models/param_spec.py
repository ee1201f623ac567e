"""The weights of a model by their paths in its tree: shapes, dtypes and logical axes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.layers.linear import Axes, Packing
from jaxserve.parallel.mesh import named_sharding

Weights: TypeAlias = dict[str, Any]
Path: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class ParamSpec:
    """One weight of the tree.

    Attributes:
        shape: its shape, with the layers that have such a weight along axis 0.
        dtype: dtype of its values.
        axes: logical axes.
        layers: indices of the layers that have it, in order; empty for weights outside of layers.
        keep_stacked: a layer gets it as `Stacked` instead of a slice.
        absorbed_only: it is folded into other maps and never applied by itself.
        packing: how it is packed, of a quantised weight and of its scales and zero points.
        loaded: the checkpoint has it.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: Axes
    layers: tuple[int, ...] = ()
    keep_stacked: bool = False
    absorbed_only: bool = False
    packing: Packing | None = None
    loaded: bool = True

    @property
    def stacked(self) -> bool:
        """Whether axis 0 is layers."""
        return bool(self.layers)

    @property
    def num_inputs(self) -> int:
        """Inputs of a matrix, however it is packed."""
        return self.shape[-1] * (self.packing or Packing()).per_byte

    def shard_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """The shape of one device's shard."""
        return named_sharding(self.axes, self.shape, mesh).shard_shape(self.shape)

    def shard_bytes(self, mesh: Mesh) -> int:
        """Bytes of one device's shard."""
        return math.prod(self.shard_shape(mesh)) * self.dtype.itemsize

    @property
    def of_experts(self) -> bool:
        """Whether it is a weight of experts: the first axis after the layers is theirs."""
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
