"""Reads the text of a compiled program: its instructions, how often each runs, and which collectives it has.

The grammar is that of `HloModule::ToString` (openxla/xla, hlo/ir). Only what a scheduled module contains is read.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Calls that run beside the program, such as a gather on a TPU's SparseCores.
_ASYNC_CALLS = ("call-start", "custom-call-start")
# The name of a Pallas kernel is the component of the operation's name before that of the primitive.
_KERNEL_CALL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)"')
_KERNEL_NAME = re.compile(r'op_name="[^"]*?([^"/]+)/(?:pallas_call|mpmd_map)"')
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_LOOP_BODY = re.compile(r"body=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTRAINTS = re.compile(r"operand_layout_constraints=\{(.*?\})\}")
_SPACE = re.compile(r"S\((\d+)\)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_WIDTH = re.compile(r"^(?:bf|f|s|u|c)(\d+)")


class Array(NamedTuple):
    """An array as a program holds it in memory.

    Attributes:
        dtype: XLA's name of the element type.
        shape: the logical shape.
        layout: XLA's text of the layout: the order of the axes, the tiles and the memory space.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def in_device_memory(self) -> bool:
        """Whether the array is in HBM, and not in a memory of the core such as VMEM."""
        space = _SPACE.search(self.layout)
        return space is None or space[1] == "0"

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, with the padding to whole tiles."""
        return math.prod(self._padded_shape) * self._bits // 8

    @property
    def _bits(self) -> int:
        if self.dtype == "pred":
            return 8
        width = _WIDTH.match(self.dtype)
        # Tokens and opaque values have no bytes.
        return int(width[1]) if width else 0

    @property
    def _padded_shape(self) -> list[int]:
        order, _, rest = self.layout.partition(":")
        tile = _TILE.search(rest)
        if tile is None or not self.shape:
            return list(self.shape)
        major_to_minor = [int(axis) for axis in reversed(order.split(","))]
        sizes = [self.shape[axis] for axis in major_to_minor]
        tiled = [int(size) for size in tile[1].split(",")]
        if len(tiled) <= len(sizes):
            first = len(sizes) - len(tiled)
            sizes[first:] = [-(-size // unit) * unit for size, unit in zip(sizes[first:], tiled, strict=True)]
        return sizes


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        name: its name, unique in the program.
        opcode: its operation.
        results: the arrays of its result; a tuple's leaves in order.
        operands: names of the instructions that it reads.
        attributes: the text after the operands.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def kernel(self) -> str | None:
        """The name of the Pallas kernel that it calls, if it calls one."""
        if self.opcode != "custom-call" or not _KERNEL_CALL.search(self.attributes):
            return None
        name = _KERNEL_NAME.search(self.attributes)
        return self.name if name is None else name[1]

    @property
    def operand_arrays(self) -> tuple[Array, ...]:
        """The operands of a custom call, as it wants them in memory."""
        constraints = _CONSTRAINTS.search(self.attributes)
        return () if constraints is None else _parse_arrays(constraints[1])

    @property
    def called(self) -> list[str]:
        """Names of the computations that it refers to."""
        names = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += [branch.strip().lstrip("%") for branch in branches.split(",")]
        return names

    @property
    def num_bytes(self) -> int:
        """Bytes of its results in device memory."""
        return sum(array.num_bytes for array in self.results if array.in_device_memory)


class Computation(NamedTuple):
    """A computation: the entry, the body of a loop, or the inside of a fusion.

    Attributes:
        instructions: the instructions in the order of the schedule, by name.
        root: name of the instruction whose result is the computation's.
    """

    instructions: Mapping[str, Instruction]
    root: str

    def users(self, name: str) -> Iterator[Instruction]:
        """Yield the instructions that read the result of another."""
        return (each for each in self.instructions.values() if name in each.operands)

    @property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        found = (each for each in self.instructions.values() if each.opcode == "parameter")
        return {int(each.operands[0]): each for each in found}


class Loops(NamedTuple):
    """The loops around an instruction.

    Attributes:
        outermost: name of the outermost loop, if there is one.
        trips: how often a run of the program runs the instruction.
        inner_trips: how often an iteration of the outermost loop runs it.
    """

    outermost: str = ""
    trips: int = 1
    inner_trips: int = 1

    def around(self, loop: str, trips: int) -> "Loops":
        """Return the loops around the body of a loop with these loops around it."""
        inner = self.inner_trips * trips if self.outermost else 1
        return Loops(self.outermost or loop, self.trips * trips, inner)


class HloProgram:
    """A compiled program.

    Args:
        text: `Compiled.as_text()`.

    Attributes:
        computations: by name.
        entry: name of the entry computation.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        instructions: dict[str, Instruction] = {}
        name = root = ""
        for line in text.splitlines():
            if not name:
                if found := _COMPUTATION.match(line):
                    name, root, instructions = found[2], "", {}
                    if found[1]:
                        self.entry = name
            elif line.startswith("}"):
                self.computations[name] = Computation(instructions, root)
                name = ""
            elif found := _INSTRUCTION.match(line):
                instructions[found[2]] = _parse_instruction(found[2], found[3])
                if found[1]:
                    root = found[2]

    def executed(self) -> Iterator[tuple[Instruction, Computation, Loops]]:
        """Yield the instructions that run as such, with their computation and the loops around them.

        The inside of fusions and reductions is not yielded, and every branch of a conditional is. A loop whose trip
        count is not known counts as not run: the sampler's search is one, which few steps need.
        """
        yield from self._executed(self.entry, Loops())

    def _executed(self, name: str, loops: Loops) -> Iterator[tuple[Instruction, Computation, Loops]]:
        computation = self.computations[name]
        for each in computation.instructions.values():
            yield each, computation, loops
            if each.opcode == "while":
                trips = self.trip_count(each) or 0
                yield from self._executed(_body(each), loops.around(each.name, trips))
            elif each.opcode in ("call", "conditional", *_ASYNC_CALLS):
                for called in each.called:
                    yield from self._executed(called, loops)

    def trip_count(self, loop: Instruction) -> int | None:
        """Return how often a `while` runs its body, or None if it is not known before the program runs.

        TPU programs do not state it: there it is the constant that the condition compares a counter with.
        """
        if stated := _TRIPS.search(loop.attributes):
            return int(stated[1])
        inside = self.computations[_CONDITION.findall(loop.attributes)[0]].instructions.values()
        limits = [each for each in inside if each.opcode == "constant" and each.results[0].shape == ()]
        compares = [each for each in inside if each.opcode == "compare" and "direction=LT" in each.attributes]
        if len(limits) != 1 or len(compares) != 1 or limits[0].name != compares[0].operands[1]:
            return None
        return int(limits[0].operands[0])

    @cached_property
    def kernels(self) -> list[str]:
        """Names of the Pallas kernels that it calls; a call in a loop counts once."""
        instructions = (each for one in self.computations.values() for each in one.instructions.values())
        return [each.kernel for each in instructions if each.kernel is not None]


class Collectives(NamedTuple):
    """Collectives of a program, by kind.

    Attributes:
        per_layer: counts in the bodies of the loops over layers.
        once: counts outside of these loops.
        per_step: how often a step runs each kind.
    """

    per_layer: Mapping[str, int]
    once: Mapping[str, int]
    per_step: Mapping[str, int]


def find_collectives(program: HloProgram) -> Collectives:
    """Count the collectives of a program; the outermost loops are those over layers."""
    per_layer, once, per_step = Counter[str](), Counter[str](), Counter[str]()
    for each, _, loops in program.executed():
        kind = each.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            (per_layer if loops.outermost else once)[kind] += 1
            per_step[kind] += loops.trips
    return Collectives(per_layer, once, +per_step)


def _body(loop: Instruction) -> str:
    return _LOOP_BODY.findall(loop.attributes)[0]


def _parse_instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opcode, _, _ = text[end:].lstrip().partition("(")
    start = text.index("(", end)
    close = _closing(text, start)
    inside = text[start + 1 : close - 1]
    # Parameters and constants have a number in place of operands.
    operands = tuple(_NAME.findall(inside)) if "%" in inside else (inside,) if inside else ()
    return Instruction(name, opcode, _parse_arrays(text[:end]), operands, text[close:])


def _parse_arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(size) for size in shape.split(",") if size), layout)
        for dtype, shape, layout in _ARRAY.findall(text)
    )


def _closing(text: str, start: int) -> int:
    """Return the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    raise ValueError(f"no closing parenthesis: {text[start : start + 80]}")
