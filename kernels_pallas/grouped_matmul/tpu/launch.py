"""Calls the TPU kernel of the grouped matmul: its grid, its blocks in VMEM, and how cores share them.

Dimension key: see `backend`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.tpu.problem import LANES, Problem
from kernels_pallas.grouped_matmul.tpu.taken_rows import scratch_shapes, take_block
from kernels_pallas.pallas import pl, pltpu
from kernels_pallas.token_tiles import Blocks

# Bytes of a block of a matrix; blocks of matrices, rows and results are all double-buffered.
_BLOCK_BYTES = 4 << 20
# Bytes of sums and of f32 operands split into parts: more than all blocks if these are f32.
_SPARE_BYTES = 16 << 20


class Launch(NamedTuple):
    """What the calls for the matrices of the same rows share.

    Attributes:
        blocks: the blocks of rows.
        row_P: i32, the token of each row of the blocks; None if rows are in the order of the blocks.
        block_rows: W.
        out_dtype: dtype of the results.
        num_cores: TensorCores of a device.
        interpret: parameters of the TPU interpret mode, or False to compile.
    """

    blocks: Blocks
    row_P: jax.Array | None
    block_rows: int
    out_dtype: jnp.dtype
    num_cores: int
    interpret: Any


class Grid(NamedTuple):
    """The grid: cores, then each core's blocks of rows, then its blocks of outputs.

    Attributes:
        num_cores: cores that share the work.
        num_blocks: blocks of rows, unused ones included.
        num_outputs: blocks of outputs.
        block_outputs: outputs of a block.
        splits_outputs: whether each core has a part of the outputs, instead of every other block of rows.
    """

    num_cores: int
    num_blocks: int
    num_outputs: int
    block_outputs: int
    splits_outputs: bool

    def shape(self, num_live: jax.Array) -> tuple[Any, ...]:
        """Return the sizes of the grid's axes."""
        # A device may have no block in use.
        num_live = jnp.maximum(num_live, 1)
        if self.splits_outputs:
            return self.num_cores, num_live, self.num_outputs // self.num_cores
        return self.num_cores, pl.cdiv(num_live, self.num_cores), self.num_outputs

    def block(self, core: Any, index: Any, num_live: Any) -> Any:
        """Return the index of a core's block of rows.

        Where blocks in use do not divide evenly, a core does its last one again, whose rows and matrix it has. If it
        had none, it has one that is not in use.
        """
        if self.splits_outputs:
            return index
        block = index * self.num_cores + core
        return jnp.where((block < num_live) | (index == 0), block, block - self.num_cores)

    def output(self, core: Any, index: Any) -> Any:
        """Return the index of a core's block of outputs."""
        return core * (self.num_outputs // self.num_cores) + index if self.splits_outputs else index


def choose_grid(num_blocks: int, num_outputs: int, output_bytes: int, num_cores: int) -> Grid:
    """Choose the blocks of outputs, and what the cores share.

    Args:
        num_blocks: blocks of rows, unused ones included.
        num_outputs: outputs of a matrix.
        output_bytes: bytes that an output of the matrix needs.
        num_cores: TensorCores of a device.
    """
    block_outputs = min(num_outputs, max(LANES, _BLOCK_BYTES // output_bytes // LANES * LANES))
    num_parts = pl.cdiv(num_outputs, block_outputs)
    if num_blocks < num_cores:
        # Only outputs can be shared, if there are enough for another division.
        even = pl.cdiv(num_parts, num_cores) * num_cores
        smaller = pl.cdiv(pl.cdiv(num_outputs, even), LANES) * LANES
        if pl.cdiv(num_outputs, smaller) == even:
            block_outputs, num_parts = smaller, even
    if num_parts % num_cores == 0:
        return Grid(num_cores, num_blocks, num_parts, block_outputs, splits_outputs=True)
    return Grid(num_cores if num_blocks >= num_cores else 1, num_blocks, num_parts, block_outputs, splits_outputs=False)


def multiply(problem: Problem, launch: Launch, num_outputs: int) -> jax.Array:
    """Return the products of all blocks with their matrices, [P, O]."""
    blocks, row_P, block_rows, out_dtype, num_cores, interpret = launch
    output_bytes = sum(each.shape[2] * each.dtype.itemsize for each in problem.by_output)
    output_bytes += sum(each.shape[1] * each.dtype.itemsize for each in problem.by_input)
    num_blocks = blocks.group_C.shape[0]
    grid = choose_grid(num_blocks, num_outputs, output_bytes * problem.work, num_cores)
    size = grid.block_outputs

    def spec(shape: tuple[int, ...], index: Any, **options: Any) -> pl.BlockSpec:
        """Return a spec whose index is a function of the blocks of rows and of outputs, and of the block's group."""

        def index_map(core: Any, c: Any, o: Any, group_C: Any, num_live_1: Any, *_: Any) -> Any:
            block = grid.block(core, c, num_live_1[0])
            return index(block, grid.output(core, o), group_C[block])

        return pl.BlockSpec(shape, index_map, **options)

    if row_P is None:
        rows = [spec((block_rows, x.shape[1]), lambda block, _, __: (block, 0)) for x in problem.rows]
    else:
        rows = [spec(x.shape, lambda *_: (0, 0)) for x in problem.rows]
    in_specs = [
        *rows,
        *(spec((1, size, each.shape[2]), lambda _, o, group: (group, o, 0)) for each in problem.by_output),
        *(spec((1, each.shape[1], size), lambda _, o, group: (group, 0, o)) for each in problem.by_input),
        *(spec(each.shape, lambda *_: (0, 0)) for each in problem.constants),
        *(
            spec((1, *each.shape[1:]), lambda _, __, group: (group, 0, 0), memory_space=pltpu.SMEM)
            for each in problem.scalars
        ),
    ]
    # XLA would copy stacks that it finds small enough into VMEM in every step, those of other layers included.
    in_hbm = partial(pltpu.with_memory_space_constraint, memory_space=pltpu.HBM)
    stacks = map(in_hbm, (*problem.by_output, *problem.by_input))
    of_rows = problem.rows if row_P is None else [x.astype(jnp.float32) for x in problem.rows]
    operands = (*of_rows, *stacks, *problem.constants, *map(in_hbm, problem.scalars))
    scalars = (blocks.group_C, blocks.num_live[None], *(() if row_P is None else (row_P,)))
    scratch = [] if row_P is None else scratch_shapes(problem.rows, block_rows)
    rows_bytes = sum((block_rows if row_P is None else x.shape[0]) * x.shape[1] * x.dtype.itemsize for x in of_rows)
    block_bytes = rows_bytes + size * output_bytes + block_rows * size * out_dtype.itemsize
    semantics = ("parallel" if grid.num_cores > 1 else "arbitrary", "arbitrary", "arbitrary")
    return pl.pallas_call(
        _kernel(problem, grid, block_rows, takes=row_P is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid.shape(blocks.num_live),
            in_specs=in_specs,
            out_specs=spec((block_rows, size), lambda block, o, _: (block, o)),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((num_blocks * block_rows, num_outputs), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=2 * block_bytes + _SPARE_BYTES
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*scalars, *operands)


def _kernel(problem: Problem, grid: Grid, block_rows: int, *, takes: bool) -> Any:
    """Return the body of the kernel, which takes the rows of a block before its first outputs if `takes`."""
    num_rows = len(problem.rows)

    def run(group_C: Any, num_live_1: Any, *refs: Any) -> None:
        del group_C
        core, index, part = (pl.program_id(axis) for axis in range(3))
        if takes:
            row_P, of_tokens = refs[0], refs[1 : 1 + num_rows]
            taken, wide = refs[-2 * num_rows : -num_rows], refs[-num_rows:]
            refs = (*taken, *refs[1 + num_rows : -2 * num_rows])

            @pl.when(part == 0)
            def _() -> None:
                for each in zip(of_tokens, taken, wide, strict=True):
                    take_block(row_P, grid.block(core, index, num_live_1[0]) * block_rows, *each)

        problem.kernel(grid.output(core, part), *refs)

    return run
