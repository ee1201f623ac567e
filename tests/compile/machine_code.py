"""Loops of machine code: SASS of NVIDIA GPUs, as nvdisasm prints it, and bundles of TPUs, as libtpu dumps them."""

import re
from dataclasses import dataclass, field

# Control codes with the stall of the warp, the address, and the instruction.
_SASS = re.compile(r"^\s+\S+:\S+:\S+:\S+:\d+\s+/\*[0-9a-f]+\*/\s+(.*?)\s*$")
_LABEL = re.compile(r"^\s*\.(L_\w+):")
_BRANCH = re.compile(r"\bBRA\b.*\(\.(L_\w+)\)")
_GMMA = re.compile(r"\b[HQI]GMMA\.64x(\d+)x(\d+)")
# The address, a mark of a loop's first bundle, the depth of the loop, and the operations.
_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(L[HBE]|P[BF])?\s*:\s+(>*)\s*\{", re.MULTILINE)
_SKIP = re.compile(r"sbr\.rel \(!?%\w+\) target = \$region(\d+)")
_TARGET = re.compile(r"Start/End empty region (\d+)")
# A branch takes effect this many bundles later.
_DELAY = 4


@dataclass(frozen=True)
class GpuLoop:
    """An innermost loop with products of warpgroups.

    Attributes:
        instructions: instructions of an iteration, which a scheduler issues one by one.
        multiplied: elements of [64, N, K] that the iteration's products multiply.
        product: the instruction of the products.
    """

    instructions: int
    multiplied: int
    product: str


def product_loops(sass: str) -> list[GpuLoop]:
    """Return the loops that multiply and have no such loops inside."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _SASS.match(line):
            code.append(found[1])
    ranges: list[tuple[int, int]] = []
    for last, instruction in enumerate(code):
        if (found := _BRANCH.search(instruction)) is None or labels.get(found[1], last + 1) > last:
            continue
        first = labels[found[1]]
        # Loops around a loop end after it, and so does code behind it that waits and goes back into the loop.
        if any(map(_GMMA.search, code[first:last])) and all(end <= first for _, end in ranges):
            ranges.append((first, last + 1))
    loops: list[GpuLoop] = []
    for first, end in ranges:
        products = [found for found in map(_GMMA.search, code[first:end]) if found]
        multiplied = sum(64 * int(found[1]) * int(found[2]) for found in products)
        loops.append(GpuLoop(end - first, multiplied, products[0][0].partition(".")[0]))
    return loops


@dataclass
class TpuLoop:
    """A loop or a whole kernel.

    Attributes:
        bundles: bundles of an iteration, without those of inner loops; each takes a cycle or more.
        skippable: those of them that a branch may skip.
        inner: the loops inside, in order.
    """

    bundles: int = 0
    skippable: int = 0
    inner: list["TpuLoop"] = field(default_factory=list)

    def cycles(self, *trips: int) -> int:
        """Return the cycles of an iteration whose inner loops, which have none inside, have so many trips."""
        assert not any(each.inner for each in self.inner)
        return self.bundles + sum(count * each.bundles for count, each in zip(trips, self.inner, strict=True))


def read_bundles(text: str) -> TpuLoop:
    """Return the loops of a kernel's final bundles."""
    found = list(_BUNDLE.finditer(text))
    ends = [each.start() for each in found[1:]] + [len(text)]
    targets: dict[str, int] = {}
    for index, (bundle, end) in enumerate(zip(found, ends, strict=True)):
        targets |= dict.fromkeys(_TARGET.findall(text, bundle.start(), end), index)
    # The last loop of each depth: bundles of a loop may be on either side of those of another depth.
    last, skipped_from, skipped_to = [TpuLoop()], [0], [0]
    for index, (bundle, end) in enumerate(zip(found, ends, strict=True)):
        depth = len(bundle[2])
        if bundle[1] == "LB" or depth >= len(last):
            del last[depth:], skipped_from[depth:], skipped_to[depth:]
            last.append(TpuLoop())
            skipped_from.append(0)
            skipped_to.append(0)
            last[depth - 1].inner.append(last[depth])
        # Whether an inner loop runs, which the code around it may skip, is for the caller to know.
        last[depth].bundles += 1
        if skipped_from[depth] <= index < skipped_to[depth]:
            last[depth].skippable += 1
            continue
        after = max((targets.get(region, 0) for region in _SKIP.findall(text, bundle.start(), end)), default=0)
        if after > index:
            skipped_from[depth], skipped_to[depth] = index + 1 + _DELAY, after
    return last[0]
