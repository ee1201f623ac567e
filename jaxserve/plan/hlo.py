"""Reads the text of a compiled program: which collectives it has, and how often a step runs them."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import NamedTuple

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Pallas kernels, on TPU and on GPU.
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)"')
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(rf"= .*? ({'|'.join(_COLLECTIVES)})(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_BODY = re.compile(r" while\(.*body=%?([\w.\-]+)")


class Collectives(NamedTuple):
    """Collectives of a program, by kind.

    Attributes:
        per_layer: counts in the bodies of the loops over layers.
        once: counts outside of these loops.
    """

    per_layer: Mapping[str, int]
    once: Mapping[str, int]

    def per_step(self, turns: Fraction) -> dict[str, int]:
        """Return how often a step runs each kind.

        Args:
            turns: the average number of times that a layer in the loop bodies runs.
        """
        kinds = [kind for kind in _COLLECTIVES if kind in self.per_layer or kind in self.once]
        counts = {kind: round(self.per_layer.get(kind, 0) * turns) + self.once.get(kind, 0) for kind in kinds}
        return {kind: count for kind, count in counts.items() if count}


def find_collectives(text: str) -> Collectives:
    """Count the collectives in `Compiled.as_text()`.

    The outermost loops are those over layers; in a program without loops, all collectives are in `once`.
    """
    computations = dict(_computations(text))
    in_loops: set[str] = set()
    for lines in computations.values():
        for line in lines:
            if body := _BODY.search(line):
                in_loops |= _reachable(computations, body[1])
    per_layer: Counter[str] = Counter()
    once: Counter[str] = Counter()
    for name, lines in computations.items():
        counter = per_layer if name in in_loops else once
        counter.update(found[1] for line in lines if (found := _OPERATION.search(line)))
    return Collectives(dict(per_layer), dict(once))


def num_kernels(text: str) -> int:
    """Count the calls of Pallas kernels in `Compiled.as_text()`; a call in a loop counts once."""
    return len(_KERNEL.findall(text))


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", list[str]()
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name, lines = found[1], []
        elif line.startswith("}") and name:
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _reachable(computations: Mapping[str, list[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in computations:
            continue
        seen.add(name)
        for line in computations[name]:
            waiting += _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                waiting += [branch.strip().lstrip("%") for branch in branches.split(",")]
    return seen
