"""Checks of the TMA copies of a Mosaic GPU kernel, from what its compiler dumps: MLIR with layouts, and PTX.

A copy that breaks one of the hardware's rules faults, or waits forever, only on a device. The rules: CUDA C++
Programming Guide, "Tensor memory access", and the driver's `cuTensorMapEncodeTiled`.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_BOX = 256  # elements of an axis that one copy moves
MAX_RANK = 5
UNIT = 16  # bytes: strides, and the innermost axis of a box, are multiples of it
ALIGNMENT = 128  # of shared memory
_SMEM = "__dynamic_shmem__0"
# The runtime places dynamic shared memory at a multiple of this, as the swizzles need.
_SMEM_ALIGNMENT = 10
_ZERO = 64  # the exponent of two that divides 0
_BITS = {"bf16": 16, "f16": 16, "f32": 32, "i32": 32, "i8": 8, "ui8": 8, "f8E4M3FN": 8}


class Copy(NamedTuple):
    """A copy between global and shared memory in the MLIR.

    Attributes:
        text: the operation.
        barrier: its barrier; empty for copies to global memory.
        lengths: elements of each axis; -1 for an axis that the copy indexes.
        strides: elements between entries of each axis of the array in global memory.
        tile: the tile of the last axes in shared memory, or empty.
        itemsize: bytes per element.
    """

    text: str
    barrier: str
    lengths: list[int]
    strides: list[int]
    tile: list[int]
    itemsize: int

    @property
    def num_bytes(self) -> int:
        """Bytes that the copy moves."""
        return math.prod(abs(length) for length in self.lengths) * self.itemsize

    @property
    def box(self) -> list[int]:
        """Elements of each axis of the tensor map that the copy moves; tiles are axes of their own."""
        plain = len(self.lengths) - len(self.tile)
        tiles = [length // tile for length, tile in zip(self.lengths[plain:], self.tile, strict=True)]
        return [length for length in self.lengths[:plain] if length != -1] + tiles + self.tile


def copy_problems(mlir: str) -> list[str]:
    """Return the rules for tensor maps and barriers that the copies of a kernel break, one sentence each."""
    return [*_map_problems(mlir), *_barrier_problems(mlir)]


def address_problems(ptx: str) -> list[str]:
    """Return the copies whose shared addresses may not be aligned, one sentence each."""
    return list(_address_problems(ptx))


def count_copies(mlir: str) -> int:
    """Return the number of copies in a kernel."""
    return sum(1 for _ in _copies(mlir))


def _copies(mlir: str) -> Iterator[Copy]:
    for line in mlir.splitlines():
        found = re.search(r'"mosaic_gpu\.async_(load|store)"\(([^)]*)\)', line)
        if not found:
            continue
        kind, operands = found[1], found[2].split(", ")
        lengths = _numbers(line, r"slice_lengths = array<i64: ([^>]*)>")
        types: list[str] = re.findall(r"memref<[^()]*?>(?=, memref|, i32|\))", line.rpartition(" : (")[2])
        in_memory = types[0 if kind == "load" else 1]
        *dims, element = re.split(r"x|,", in_memory.removeprefix("memref<").partition(">")[0])[: _rank(in_memory) + 1]
        sizes = [int(size) for size in dims]
        strided = _numbers(in_memory, r"strided<\[([\d, ]*)\]")
        strides = strided or [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        tile = _numbers(line, r"#mosaic_gpu\.tile<\[([^\]]*)\]>")
        yield Copy(line.strip(), operands[2] if kind == "load" else "", lengths, strides, tile, _BITS[element] // 8)


def _rank(memref: str) -> int:
    return len(re.findall(r"\d+x", memref.partition(",")[0]))


def _numbers(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(number) for number in found[1].split(",")] if found else []


def _map_problems(mlir: str) -> Iterator[str]:
    for copy in _copies(mlir):
        box = copy.box
        if len(box) > MAX_RANK:
            yield f"a tensor map of {len(box)} axes, at most {MAX_RANK}: {copy.text}"
        if max(box, default=1) > MAX_BOX:
            yield f"a box of {box} elements, at most {MAX_BOX} per axis: {copy.text}"
        if box and box[-1] * copy.itemsize % UNIT:
            yield f"{box[-1] * copy.itemsize} adjacent bytes, no multiple of {UNIT}: {copy.text}"
        if any(stride * copy.itemsize % UNIT for stride in copy.strides[:-1]):
            yield f"strides of {copy.strides} elements, no multiples of {UNIT} bytes: {copy.text}"


def _barrier_problems(mlir: str) -> Iterator[str]:
    """Yield barriers that expect other numbers of bytes than are copied before they expect more."""
    copies = {copy.text: copy for copy in _copies(mlir)}
    expected: dict[str, int] = {}
    for line in map(str.strip, mlir.splitlines()):
        if found := re.search(r"mosaic_gpu\.arrive_expect_tx barrier\((%\w+)[^)]*\)\s*%c(\d+)_i32", line):
            if expected.get(found[1], 0):
                yield f"barrier {found[1]} expects {expected[found[1]]} bytes that no copy brings"
            expected[found[1]] = int(found[2])
        elif (copy := copies.get(line)) and copy.barrier:
            if expected.get(copy.barrier) != copy.num_bytes:
                yield f"barrier {copy.barrier} expects {expected.get(copy.barrier, 0)} bytes: {copy.text}"
            expected[copy.barrier] = 0


def _address_problems(ptx: str) -> Iterator[str]:
    exponents = _exponents(ptx)
    for line in map(str.strip, ptx.splitlines()):
        if "cp.async.bulk" not in line or "[" not in line:
            continue
        operands = re.findall(r"\[(%\w+)(?:\s*\+\s*(\d+))?(?:, \{[^}]*\}\s*)?\]", line)
        # The first operand is the destination, the second the source, unless that is a tensor map.
        register, offset = operands[0] if ".shared::cta.global" in line or ".shared::cluster" in line else operands[1]
        needed = ALIGNMENT if ".tensor" in line else UNIT
        exponent = min(exponents.get(register, 0), _exponent(int(offset or 0)))
        if 1 << exponent < needed:
            yield f"an address in shared memory that may be a multiple of only {1 << exponent} bytes: {line}"


def _exponents(ptx: str) -> dict[str, int]:
    """Return, for each register, an exponent of two that divides all its values."""
    definitions = [
        (found[2], found[1], [operand.strip() for operand in found[3].split(",")])
        for found in re.finditer(r"^\s*(?:@!?%\w+ )?([a-z][\w.:]*)\s+(%\w+), ([^;\[\]{}|]+);", ptx, re.MULTILINE)
    ]
    exponents = dict.fromkeys((register for register, _, _ in definitions), _ZERO)
    known = {register for register, _, _ in definitions}
    # Loaded values, and those of other instructions, may be anything.
    others = set(re.findall(r"%\w+", ptx)) - known
    exponents |= dict.fromkeys(others, 0)
    changed = True
    while changed:
        changed = False
        for register, operation, operands in definitions:
            exponent = min(exponents[register], _result(operation, [_value(each, exponents) for each in operands]))
            if exponent != exponents[register]:
                exponents[register], changed = exponent, True
    return exponents


def _value(operand: str, exponents: dict[str, int]) -> tuple[int, int | None]:
    """Return the exponent of an operand, and its value if it is a constant."""
    if operand == _SMEM:
        return _SMEM_ALIGNMENT, None
    if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", operand):
        return _exponent(int(operand, 0)), int(operand, 0)
    return exponents.get(operand, 0), None


def _exponent(number: int) -> int:
    return (number & -number).bit_length() - 1 if number else _ZERO


def _result(operation: str, operands: list[tuple[int, int | None]]) -> int:
    exponents = [exponent for exponent, _ in operands]
    name = operation.partition(".")[0]
    if name == "mov" or name.startswith("cvt") or name == "neg":
        return exponents[0]
    if name in ("add", "sub", "min", "max", "or", "xor", "rem"):
        return min(exponents)
    if name == "selp":
        return min(exponents[:2])
    if name == "and":
        return max(exponents)
    if name == "mul" and ".hi" not in operation:
        return min(_ZERO, sum(exponents))
    if name == "mad" and ".hi" not in operation:
        return min(_ZERO, sum(exponents[:2]), exponents[2])
    if name == "shl":
        return min(_ZERO, exponents[0] + (operands[1][1] or 0))
    if name == "shr" and operands[1][1] is not None:
        return max(0, exponents[0] - operands[1][1]) if exponents[0] < _ZERO else _ZERO
    return 0
