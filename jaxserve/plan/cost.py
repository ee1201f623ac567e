"""What a compiled program costs: the bytes it moves, the kernels it launches, and where it stops the host.

Everything is read from the scheduled HLO. An instruction moves its operands and its results once per run; of an
operand that it slices or gathers from, it moves what it takes. Pallas kernels move what their own schedule says for a
load, which the caller supplies, because the pages and experts that they read depend on the requests.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxserve.plan.hlo import COLLECTIVES, Array, Computation, HloProgram, Instruction

# Instructions that name memory and move nothing.
_FREE = frozenset(
    (
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
        "replica-id", "add-dependency", "while", "conditional", "call", "copy-done", "async-done", "async-update",
        "all-reduce-done", "all-gather-done", "collective-permute-done", "slice-done", "fusion-done",
        "call-start", "call-done", "custom-call-start", "custom-call-update", "custom-call-done",
    )
)  # fmt: skip
# Instructions inside a fusion that pass their operand on unread.
_VIEWS = frozenset(("bitcast", "get-tuple-element", "tuple", "reshape"))
_TAKING = frozenset(("dynamic-slice", "slice", "gather"))
_WRITING = frozenset(("dynamic-update-slice", "scatter"))
_LIBRARY_CALL = re.compile(r'custom_call_target="__cublas')
_ALLOCATION = re.compile(r'custom_call_target="AllocateBuffer"')
_FUSED_CALL = re.compile(r"calls=%?([\w.\-]+)")


class Moved(NamedTuple):
    """The bytes of device memory that an instruction moves.

    Attributes:
        instruction: the instruction.
        trips: how often a run of the program runs it.
        read, written: bytes that it reads and writes in each run.
    """

    instruction: Instruction
    trips: int
    read: int
    written: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all runs."""
        return self.trips * (self.read + self.written)


class Cost(NamedTuple):
    """The cost of one run of a program on one device.

    Attributes:
        moved: bytes by instruction, Pallas kernels excluded.
        kernels: calls of Pallas kernels, with how often each runs.
        launches_in_loops: kernels launched in one iteration of each outermost loop, collectives excluded.
        host_stops: names of the instructions at which a GPU returns to the host before it goes on.
        rematerialized: names of instructions that the compiler repeats to save memory.
    """

    moved: list[Moved]
    kernels: list[tuple[Instruction, int]]
    launches_in_loops: list[int]
    host_stops: list[str]
    rematerialized: list[str]

    def num_bytes(self, kernel_bytes: Callable[[Instruction], float]) -> float:
        """Return the bytes that the program moves.

        Args:
            kernel_bytes: returns the bytes that one run of a Pallas kernel moves.
        """
        others = sum(each.num_bytes for each in self.moved)
        return others + sum(trips * kernel_bytes(kernel) for kernel, trips in self.kernels)


def read_cost(program: HloProgram) -> Cost:
    """Return the cost of a compiled program; see `HloProgram.executed` for what counts as run."""
    moved: list[Moved] = []
    kernels: list[tuple[Instruction, int]] = []
    launches: dict[str, int] = {}
    for each, computation, loops in program.executed():
        if each.opcode == "custom-call-start" and not each.called:
            raise NotImplementedError(f"the bytes of {each.name}, an asynchronous call, are not accounted for")
        if each.opcode in _FREE:
            continue
        if loops.outermost and not _is_collective(each):
            launches[loops.outermost] = launches.get(loops.outermost, 0) + loops.inner_trips
        if (kernel := _kernel(program, each)) is not None:
            kernels.append((kernel, loops.trips))
        else:
            reads = (_operand_bytes(program, computation, each, index) for index in range(len(each.operands)))
            moved.append(Moved(each, loops.trips, sum(reads), _result_bytes(program, computation, each)))
    return Cost(moved, kernels, list(launches.values()), list(_host_stops(program)), list(_repeated(program)))


def _kernel(program: HloProgram, instruction: Instruction) -> Instruction | None:
    """Return the call of a Pallas kernel, which may be in a fusion with slices of its operands."""
    if instruction.kernel is not None:
        return instruction
    inside = _fused(program, instruction)
    found = (each for each in inside.instructions.values() if each.kernel is not None) if inside else iter(())
    return next(found, None)


def _result_bytes(program: HloProgram, computation: Computation, instruction: Instruction) -> int:
    """Return the bytes that one run of an instruction writes."""
    if instruction.opcode == "copy-start":
        # The result also names the source.
        return _bytes_of(instruction.results[:1])
    if (inside := _fused(program, instruction)) is not None:
        results = instruction.results
        if instruction.opcode != "fusion":
            # An asynchronous call's result names its operands before its results.
            first = len(instruction.operands)
            results = results[first : first + len(inside.instructions[inside.root].results)]
        return _written_bytes(inside, results)
    if instruction.opcode in _WRITING:
        return computation.instructions[instruction.operands[_update(instruction)]].num_bytes
    if _ALLOCATION.search(instruction.attributes):
        return 0
    return _bytes_of(_without_workspace([instruction], instruction.results))


def _without_workspace(instructions: Iterable[Instruction], results: Sequence[Array]) -> Sequence[Array]:
    """Leave out the workspace of a cuBLAS call, which is memory and no result."""
    if any(_LIBRARY_CALL.search(each.attributes) for each in instructions):
        return [array for array in results if array.dtype != "s8"]
    return results


def _bytes_of(arrays: Iterable[Array]) -> int:
    return sum(array.num_bytes for array in arrays if array.in_device_memory)


def _update(writing: Instruction) -> int:
    """Return the index of the operand that an instruction writes into its first operand."""
    return 1 if writing.opcode == "dynamic-update-slice" else -1


def _fused(program: HloProgram, instruction: Instruction) -> Computation | None:
    """Return the inside of a fusion or of an asynchronous call."""
    if instruction.opcode not in ("fusion", "fusion-start", "async-start"):
        return None
    called = _FUSED_CALL.search(instruction.attributes)
    return None if called is None else program.computations[called[1]]


def _operand_bytes(program: HloProgram, computation: Computation, user: Instruction, index: int) -> int:
    """Return the bytes that an instruction reads of one of its operands."""
    operand = computation.instructions[user.operands[index]]
    whole = operand.num_bytes
    if operand.opcode == "constant" and not operand.results[0].shape:
        return 0
    inside = _fused(program, user)
    if inside is not None:
        parameter = inside.parameters[index]
        return min(whole, _read_bytes(program, inside, parameter.name, whole))
    if user.opcode in _TAKING and index == 0:
        return min(whole, user.num_bytes) if operand.num_bytes else 0
    if user.opcode in _WRITING and index == 0:
        return 0
    return whole


def _read_bytes(program: HloProgram, inside: Computation, name: str, whole: int) -> int:
    """Return the bytes that a fusion reads of a parameter that has `whole` bytes in device memory."""
    if not whole or name == inside.root:
        return whole
    total = 0
    for user in inside.users(name):
        index = user.operands.index(name)
        if user.opcode in _VIEWS:
            total += _read_bytes(program, inside, user.name, whole)
        elif user.opcode in _TAKING and index == 0:
            total += sum(array.num_bytes for array in user.results)
        elif user.opcode in _WRITING and index == 0:
            continue
        elif (nested := _fused(program, user)) is not None:
            total += _read_bytes(program, nested, nested.parameters[index].name, whole)
        else:
            return whole
    return total


def _written_bytes(inside: Computation, results: Sequence[Array]) -> int:
    """Return the bytes that a fusion writes to its results: an update in place writes the update."""
    root = inside.instructions[inside.root]
    kept = _without_workspace(inside.instructions.values(), results)
    parts = root.operands if root.opcode == "tuple" else (root.name,)
    if len(parts) != len(results):
        return _bytes_of(kept)  # one call with several results
    return sum(
        _update_bytes(inside, part, array.num_bytes)
        for part, array in zip(parts, results, strict=True)
        if array.in_device_memory and array in kept
    )


def _update_bytes(inside: Computation, name: str, whole: int) -> int:
    """Return the bytes that are written to a result of `whole` bytes."""
    instruction = inside.instructions[name]
    if instruction.opcode == "bitcast":
        return _update_bytes(inside, instruction.operands[0], whole)
    if instruction.opcode in _WRITING:
        return sum(array.num_bytes for array in inside.instructions[instruction.operands[_update(instruction)]].results)
    return whole


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in COLLECTIVES


def _host_stops(program: HloProgram) -> Iterator[str]:
    """Yield conditionals, and loops whose trip count is not known: a GPU's host waits for their predicates."""
    for computation in program.computations.values():
        for each in computation.instructions.values():
            if each.opcode == "conditional" or (each.opcode == "while" and program.trip_count(each) is None):
                yield each.name


def _repeated(program: HloProgram) -> Iterator[str]:
    for computation in program.computations.values():
        yield from (name for name in computation.instructions if ".remat" in name)
