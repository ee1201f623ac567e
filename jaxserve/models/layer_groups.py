"""Which layers of a model repeat, so that a step's program holds each group once."""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K")


class LayerGroup(NamedTuple, Generic[K]):
    """Layers of a few kinds in turn.

    Attributes:
        first: number of the group's first layer.
        kinds: of the layers that are repeated together.
        repeats: how often.
    """

    first: int
    kinds: tuple[K, ...]
    repeats: int


def group_layers(kinds: Sequence[K]) -> list[LayerGroup[K]]:
    """Cut a model into groups, each as long as it can be and, among those, of the fewest layers.

    Args:
        kinds: of each layer.
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
