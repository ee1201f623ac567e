"""Specs of a model's weights: shapes, dtypes and logical axes, by path in the model's tree."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.config import QuantizationConfig
from jaxserve.layers.linear import Axes, Packing
from jaxserve.parallel.mesh import named_sharding

Weights: TypeAlias = dict[str, Any]
Path: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class ParamSpec:
    """Spec of one weight of the tree.

    Attributes:
        shape: shape of the weight, stacked along axis 0 over the layers that have it.
        dtype: dtype of its values.
        axes: logical axes.
        layers: indices of the layers that have the weight, in order; empty for weights outside of layers.
        keep_stacked: layers receive the weight as `Stacked` instead of a slice.
        absorbed_only: the weight is folded into other ops and never applied directly.
        packing: packing of a quantised weight or of its scales or zero points.
        stored: format of the checkpoint's weight if it is quantised and this one is not.
        loaded: the weight is loaded from the checkpoint.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: Axes
    layers: tuple[int, ...] = ()
    keep_stacked: bool = False
    absorbed_only: bool = False
    packing: Packing | None = None
    stored: QuantizationConfig | None = None
    loaded: bool = True

    @property
    def stacked(self) -> bool:
        """Whether axis 0 is the layer axis."""
        return bool(self.layers)

    @property
    def num_inputs(self) -> int:
        """Number of inputs of a matrix, independent of its packing."""
        return self.shape[-1] * (self.packing or Packing()).per_byte

    def shard_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """Return the shape of one device's shard."""
        return named_sharding(self.axes, self.shape, mesh).shard_shape(self.shape)

    def shard_bytes(self, mesh: Mesh) -> int:
        """Return the size of one device's shard in bytes."""
        return math.prod(self.shard_shape(mesh)) * self.dtype.itemsize

    @property
    def of_experts(self) -> bool:
        """Whether this is a weight of experts, with the expert axis first after any layer axis."""
        return self.axes[self.stacked : self.stacked + 1] in (("experts",), ("experts_shared",))


def tree_of(leaves: Iterable[tuple[Path, Any]]) -> Weights:
    """Build nested dicts from paths."""
    tree: Weights = {}
    for path, leaf in leaves:
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree
