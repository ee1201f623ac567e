"""Scanning of repeating layers, so that a step's program contains each group of layers once.

The weights of a layer's child, such as its attention, are stacked over the layers that have such a child.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax

from jaxserve.config import LayerConfig
from jaxserve.models.param_spec import Path
from kernels_pallas.stacked import Stacked

K = TypeVar("K")


class LayerGroup(NamedTuple, Generic[K]):
    """Consecutive layers whose kinds repeat.

    Attributes:
        first: index of the group's first layer.
        kinds: kinds of the layers in one repetition, in order.
        repeats: number of repetitions.
    """

    first: int
    kinds: tuple[K, ...]
    repeats: int


def group_layers(kinds: Sequence[K]) -> list[LayerGroup[K]]:
    """Split a model into groups, each with maximum length and, for that length, the fewest layers per repetition.

    Args:
        kinds: the kind of each layer.
    """
    groups: list[LayerGroup[K]] = []
    first = 0
    while first < len(kinds):
        rest = tuple(kinds[first:])
        candidates = [LayerGroup(first, rest[:size], _repeats(rest, size)) for size in range(1, len(rest) // 2 + 1)]
        candidates = [group for group in candidates if group.repeats > 1] or [LayerGroup(first, rest[:1], 1)]
        group = max(candidates, key=lambda group: (len(group.kinds) * group.repeats, -len(group.kinds)))
        groups.append(group)
        first += len(group.kinds) * group.repeats
    return groups


def _repeats(kinds: tuple[K, ...], size: int) -> int:
    count = 1
    while kinds[count * size : (count + 1) * size] == kinds[:size]:
        count += 1
    return count


class LayerIndex(NamedTuple):
    """A layer of a group in one iteration of the scan.

    Attributes:
        group: the layer's group.
        offset: index of the layer in a repetition.
        turn: i32 scalar, index of the repetition.
    """

    group: LayerGroup[LayerConfig]
    offset: int
    turn: jax.Array

    @property
    def kind(self) -> LayerConfig:
        """The kind of the layer."""
        return self.group.kinds[self.offset]

    @property
    def number(self) -> jax.Array:
        """Index of the layer in the model, i32 scalar."""
        return self.group.first + self.offset + self.turn * len(self.group.kinds)


class LayerStacks:
    """Maps layers to their children and to their indices in the children's stacks.

    Args:
        layers: the kind of each layer.
        children: names of the children of each kind.
    """

    def __init__(self, layers: Sequence[LayerConfig], children: Mapping[LayerConfig, Sequence[str]]) -> None:
        self._children = children
        names = dict.fromkeys(name for kind in children.values() for name in kind)
        self._layers = {
            name: tuple(index for index, kind in enumerate(layers) if name in children[kind]) for name in names
        }

    def layers_with(self, child: str) -> tuple[int, ...]:
        """Return the indices of the layers that have such a child, in order."""
        return self._layers[child]

    def take(
        self, stacked: Mapping[str, Any], layer: LayerIndex, take: Callable[[Path, Stacked], Any]
    ) -> dict[str, Any]:
        """Return a layer's part of trees that are stacked over the layers that have them.

        Args:
            stacked: trees by name of the child.
            layer: the layer.
            take: makes a leaf of the result from its path in the model and its part of the stack.
        """
        parts: dict[str, Any] = {}
        for name, tree in stacked.items():
            if name not in self._children[layer.kind]:
                continue
            # Index among the layers with this child, and number of such layers per repetition.
            first = self._layers[name].index(layer.group.first + layer.offset)
            stride = sum(name in self._children[kind] for kind in layer.group.kinds)
            index = first + layer.turn * stride

            def take_leaf(keys: tuple[Any, ...], stack: jax.Array, name: str = name, index: Any = index) -> Any:
                return take(("layers", name, *(key.key for key in keys)), Stacked(stack, index))

            parts[name] = jax.tree_util.tree_map_with_path(take_leaf, tree)
        return parts
