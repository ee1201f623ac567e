"""The kernel of the grouped matmul on Hopper GPUs: one block of rows times some outputs of its group's matrix.

Outputs are the rows of a wgmma product, of which there are always 64, and the block's rows are its columns, of which
there may be as few as 8. One warpgroup copies the operands of later steps while the others multiply.

Dimension key: see `backend`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.gpu.results import add_bias, copy_out, round_into
from kernels_pallas.grouped_matmul.gpu.tile import BLOCK_SCALED, Tile
from kernels_pallas.grouped_matmul.gpu.weights import WORD_BYTES, Ahead, Converter, Place, Weight, choose_converter
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.quantized import QuantizedFormat
from kernels_pallas.token_tiles import Blocks
from kernels_pallas.warpgroup import COLUMNS, MATRIX, WARPGROUP_ROWS, product, smem


class Operands(NamedTuple):
    """Operands in global memory.

    Attributes:
        x_hPB: rows of all blocks; h is 2 for 4-bit matrices, whose inputs are in the order of `order_of_words`.
        weights: the matrices; all are multiplied by the same rows.
        x_scale_iP: scales of rows that are quantised; else None.
    """

    blocks: Blocks
    x_hPB: Any
    weights: Sequence[Weight]
    x_scale_iP: Any = None


class Scratch(NamedTuple):
    """Shared memory of a thread block.

    Attributes:
        x_hmB, w_oB: stages of the operands.
        arrived: barriers: the operands of a stage are there.
        free: barriers: all warpgroups have multiplied a stage.
        converted: slots of converted matrices by warpgroup, h halves of 64 outputs each, or None.
        out: the sums by warpgroup, before they are copied to global memory: [m, 64], or [64, m] in f32.
    """

    x_hmB: Any
    w_oB: Any
    arrived: Any
    free: Any
    converted: Any
    out: Any


class Heads(NamedTuple):
    """Blocks that are heads: they have the same rows, and columns and a matrix of their own.

    Attributes:
        number: number of heads; `Operands.blocks` has the layer instead of groups.
        columns: columns of the rows that belong to a head; its matrix is multiplied by the first ones.
        stride, offset: matrices of a head in the stack, and which of them is used.
    """

    number: int
    columns: int
    stride: int
    offset: int


class Problem(NamedTuple):
    """Static parameters of the kernel.

    Attributes:
        tile: the tile of a thread block.
        format: format of quantised matrices.
        num_steps: steps of a thread block.
        transposed: whether matrices are [X, I, O].
        heads: the heads, if the blocks are heads.
        quantized_rows: whether rows have the elements of the matrices, which are then not converted.
    """

    tile: Tile
    format: QuantizedFormat | None
    num_steps: int
    transposed: bool = False
    heads: Heads | None = None
    quantized_rows: bool = False

    @property
    def matrix_columns(self) -> int:
        """Columns of a step in the matrix: 4-bit elements are read as words."""
        is_packed = self.format is not None and self.format.per_byte > 1
        return self.tile.columns // WORD_BYTES if is_packed else self.tile.columns


class _Block(NamedTuple):
    """What a block multiplies.

    Attributes:
        group: index of its matrix.
        rows: its rows.
        x_column, out_column: its first column of the rows, and of the results.
    """

    group: jax.Array
    rows: Any
    x_column: Any = 0
    out_column: Any = 0


class Launch(NamedTuple):
    """How the kernel is launched.

    Attributes:
        name: name of the kernel.
        grid: sizes of the axes `outputs`, `block` and `split`; the last one runs fastest.
        out_shapes, out_dtype: results; see `_multiply`.
        interpret: parameters of the GPU interpret mode, or False to compile.
    """

    name: str
    grid: Mapping[str, int]
    out_shapes: Sequence[tuple[int, ...]]
    out_dtype: Any
    interpret: Any


def multiply(operands: Operands, problem: Problem, launch: Launch) -> list[jax.Array]:
    """Run the kernel."""
    w_dtype = operands.weights[0].w.dtype
    # Every call needs a new function: a function that is reused with another grid keeps its first trace.
    kernel = plgpu.kernel(
        partial(_multiply, problem=problem),
        out_type=[jax.ShapeDtypeStruct(shape, launch.out_dtype) for shape in launch.out_shapes],
        scratch_types=[_scratch_types(problem, operands.x_hPB.dtype, w_dtype, launch.out_dtype)],
        grid=tuple(launch.grid.values()),
        grid_names=tuple(launch.grid),
        num_threads=problem.tile.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=launch.name,
        interpret=launch.interpret,
    )
    return kernel(operands)


def _scratch_types(problem: Problem, x_dtype: Any, w_dtype: Any, out_dtype: Any) -> Scratch:
    """Return the types of `Scratch`."""
    tile, format = problem.tile, problem.format
    halves = 1 if format is None else format.per_byte
    # Operands of a product must have the same swizzle.
    like = tile.columns if problem.transposed else None
    out_shape = (tile.warpgroups, tile.rows, WARPGROUP_ROWS)
    if out_dtype == jnp.float32:
        out_shape = (tile.warpgroups, WARPGROUP_ROWS, tile.rows)
    converted = None
    if format is not None and not problem.quantized_rows:
        shape = (tile.warpgroups, tile.slots, halves, WARPGROUP_ROWS, tile.columns)
        converted = smem(shape, x_dtype)
    return Scratch(
        x_hmB=smem((tile.stages, halves, tile.rows, tile.columns), x_dtype),
        w_oB=smem((tile.stages, *_matrix_shape(problem)), w_dtype, like=like),
        arrived=plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
        free=plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages),
        converted=converted,
        out=smem(out_shape, out_dtype),
    )


def _matrix_shape(problem: Problem) -> tuple[int, int]:
    """Return the shape of a step's part of a matrix."""
    shape = problem.tile.outputs, problem.matrix_columns
    return (shape[1], shape[0]) if problem.transposed else shape


def _multiply(operands: Operands, *refs: Any, problem: Problem) -> None:
    """Multiply a block of rows by the outputs of one thread block, which all belong to one matrix.

    Args:
        operands: the operands.
        refs: results by matrix, [P, O], and `Scratch`. Instead of several results, one array for all matrices with the
            sums of each split, f32[splits, O, P], which is not transposed while it is stored: layout inference finds no
            layout for 32-bit values.
        problem: parameters of the kernel.
    """
    *outs, scratch = refs
    first, at = 0, lax.axis_index("outputs")
    for index, weight in enumerate(operands.weights):
        out, column = (outs[0], first * problem.tile.outputs) if len(outs) < len(operands.weights) else (outs[index], 0)
        end = first + weight.w.shape[2 if problem.transposed else 1] // problem.tile.outputs
        here = (at >= first) & (at < end)
        if problem.heads is None:
            here &= lax.axis_index("block") < operands.blocks.num_live
        one = operands._replace(weights=(weight,))
        output = (at - first) * problem.tile.outputs
        pl.when(here)(partial(_multiply_matrix, one, out, scratch, output, column, problem))
        first = end


def _multiply_matrix(
    operands: Operands, out: Any, scratch: Scratch, output: jax.Array, out_column: int, problem: Problem
) -> None:
    """Multiply by one matrix, from `output` on; its results start at a column of `out`."""
    tile, warpgroup = problem.tile, lax.axis_index("warpgroup")
    split = lax.axis_index("split")
    (weight,) = operands.weights
    block = _find_block(operands, problem, weight.w.shape[2 if problem.transposed else 1])

    @pl.when(warpgroup == tile.warpgroups)
    def _copy() -> None:
        _stream(operands, scratch, block, Place(weight, block.group, output, split * problem.num_steps), problem)

    @pl.when(warpgroup < tile.warpgroups)
    def _compute() -> None:
        own = output + warpgroup * WARPGROUP_ROWS
        place = Place(weight, block.group, own, split * problem.num_steps)
        if problem.quantized_rows:
            sum_om = _sum_up_quantized(scratch, place, operands.x_scale_iP.at[:, block.rows], problem)
        else:
            sum_om = _sum_up(scratch, place, problem)
        bias_O = None if weight.bias is None else weight.bias.at[block.group, pl.ds(own, WARPGROUP_ROWS)]
        sum_om = add_bias(sum_om, bias_O)
        outputs = pl.ds(out_column + block.out_column + own, WARPGROUP_ROWS)
        buffer = scratch.out.at[warpgroup]
        if scratch.out.dtype == jnp.float32:
            buffer[...], target = sum_om, out.at[split, outputs, block.rows]
        else:
            round_into(sum_om, buffer)
            target = out.at[block.rows, outputs]
        copy_out(buffer, target)


def _find_block(operands: Operands, problem: Problem, num_outputs: int) -> _Block:
    """Return what this thread block multiplies."""
    index, heads = lax.axis_index("block"), problem.heads
    if heads is None:
        return _Block(operands.blocks.group_C[index], pl.ds(index * problem.tile.rows, problem.tile.rows))
    group = (operands.blocks.group_C[0] * heads.number + index) * heads.stride + heads.offset
    return _Block(group, pl.ds(0, problem.tile.rows), index * heads.columns, index * num_outputs)


def _stream(operands: Operands, scratch: Scratch, block: _Block, place: Place, problem: Problem) -> None:
    """Run the warpgroup that copies: start the copies of each step as soon as its stage is free."""
    tile = problem.tile
    outputs = pl.ds(place.output, tile.outputs)

    @pl.loop(0, problem.num_steps)
    def _copy(step: jax.Array) -> None:
        stage = lax.rem(step, tile.stages)
        pl.when(step >= tile.stages)(partial(plgpu.barrier_wait, scratch.free.at[stage]))
        column, arrived = (place.first_step + step) * tile.columns, scratch.arrived.at[stage]
        x_hmB = operands.x_hPB.at[:, block.rows, pl.ds(block.x_column + column, tile.columns)]
        plgpu.copy_gmem_to_smem(x_hmB, scratch.x_hmB.at[stage], arrived)
        columns = pl.ds((place.first_step + step) * problem.matrix_columns, problem.matrix_columns)
        part = (columns, outputs) if problem.transposed else (outputs, columns)
        plgpu.copy_gmem_to_smem(place.weight.w.at[place.group, *part], scratch.w_oB.at[stage], arrived)


def _sum_up(scratch: Scratch, place: Place, problem: Problem) -> jax.Array:
    """Return the sum of all steps, f32[64, m]."""
    shape = (WARPGROUP_ROWS, problem.tile.rows)
    accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
    if problem.format is None:
        return pl.run_scoped(partial(_sum_up_plain, scratch, problem), accumulator)
    converter = choose_converter(problem.format, problem.tile)
    if problem.format == BLOCK_SCALED:
        sum_om = _sum_up_scaled(scratch, place, problem, converter)
    else:
        sum_om = pl.run_scoped(partial(_sum_up_converted, scratch, place, problem, converter), accumulator)
    return converter.finish(place, sum_om)


def _outputs(scratch: Scratch, stage: jax.Array) -> Any:
    """Return this warpgroup's outputs of a stage."""
    return scratch.w_oB.at[stage, pl.ds(lax.axis_index("warpgroup") * WARPGROUP_ROWS, WARPGROUP_ROWS)]


def _sum_up_plain(scratch: Scratch, problem: Problem, sum_om: Any) -> jax.Array:
    @pl.loop(0, problem.num_steps)
    def _step(step: jax.Array) -> None:
        stage = lax.rem(step, problem.tile.stages)
        plgpu.barrier_wait(scratch.arrived.at[stage])
        w_oB = _outputs(scratch, stage)
        if problem.transposed:
            w_oB = scratch.w_oB.at[stage, :, pl.ds(lax.axis_index("warpgroup") * WARPGROUP_ROWS, WARPGROUP_ROWS)].T
        plgpu.wgmma(sum_om, w_oB, scratch.x_hmB.at[stage, 0].T)
        plgpu.wgmma_wait(1)
        _free_previous(scratch, step)

    return sum_om[...]


def _sum_up_converted(scratch: Scratch, place: Place, problem: Problem, converter: Converter, sum_om: Any) -> jax.Array:
    """Sum up converted steps; a step is converted while the one before is multiplied.

    Pallas puts a barrier of the warpgroup before each store to shared memory. It keeps a warp from converting into a
    slot that another warp's products still read: two slots are enough only because of it.
    """
    tile, mine = problem.tile, scratch.converted.at[lax.axis_index("warpgroup")]
    halves = scratch.x_hmB.shape[1]

    def add(step: jax.Array, ahead: Ahead) -> Ahead:
        stage, slot = lax.rem(step, tile.stages), lax.rem(step, tile.slots)
        later = converter.load(place, _next_step(place, step, problem))
        plgpu.barrier_wait(scratch.arrived.at[stage])
        converter.convert(_outputs(scratch, stage), ahead, mine.at[slot])
        plgpu.commit_smem()
        for half in range(halves):
            plgpu.wgmma(sum_om, mine.at[slot, half], scratch.x_hmB.at[stage, half].T)
        plgpu.wgmma_wait(halves)
        _free_previous(scratch, step)
        return later

    lax.fori_loop(0, problem.num_steps, add, converter.load(place, place.first_step))
    return sum_om[...]


def _sum_up_scaled(scratch: Scratch, place: Place, problem: Problem, converter: Converter) -> jax.Array:
    """Sum up steps whose products are scaled."""
    shape, mine = (WARPGROUP_ROWS, problem.tile.rows), scratch.converted.at[lax.axis_index("warpgroup"), 0]

    def add(step: jax.Array, carry: tuple[jax.Array, Ahead]) -> tuple[jax.Array, Ahead]:
        sum_om, ahead = carry
        stage = lax.rem(step, problem.tile.stages)
        later = converter.load(place, _next_step(place, step, problem))
        plgpu.barrier_wait(scratch.arrived.at[stage])
        converter.convert(_outputs(scratch, stage), ahead, mine)
        plgpu.commit_smem()
        part_om = product(mine.at[0], scratch.x_hmB.at[stage, 0].T, problem.tile.rows)
        plgpu.barrier_arrive(scratch.free.at[stage])
        return sum_om + converter.scale(ahead, part_om), later

    zeros_om = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)
    return lax.fori_loop(0, problem.num_steps, add, (zeros_om, converter.load(place, place.first_step)))[0]


def _sum_up_quantized(scratch: Scratch, place: Place, x_scale_im: Any, problem: Problem) -> jax.Array:
    """Return the sum of all steps, f32[64, m], of rows and a matrix whose elements are multiplied as they are."""
    shape = (WARPGROUP_ROWS, problem.tile.rows)
    assert problem.format is not None
    converter = choose_converter(problem.format, problem.tile)

    def row_scales(block: Any) -> jax.Array:
        scale_m = plgpu.load(x_scale_im.at[block], layout=COLUMNS, optimized=False)
        return lax.broadcast_in_dim(scale_m, shape, [1])

    if problem.format != BLOCK_SCALED:
        accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
        sum_om = pl.run_scoped(partial(_sum_up_plain, scratch, problem), accumulator)
        return converter.finish(place, sum_om) * row_scales(0)

    def add(step: jax.Array, carry: tuple[jax.Array, Ahead]) -> tuple[jax.Array, Ahead]:
        sum_om, ahead = carry
        stage = lax.rem(step, problem.tile.stages)
        later = converter.load(place, _next_step(place, step, problem))
        scales_om = row_scales(place.first_step + step)
        plgpu.barrier_wait(scratch.arrived.at[stage])
        part_om = product(_outputs(scratch, stage), scratch.x_hmB.at[stage, 0].T, problem.tile.rows)
        plgpu.barrier_arrive(scratch.free.at[stage])
        return sum_om + converter.scale(ahead, part_om) * scales_om, later

    zeros_om = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)
    return lax.fori_loop(0, problem.num_steps, add, (zeros_om, converter.load(place, place.first_step)))[0]


def _next_step(place: Place, step: jax.Array, problem: Problem) -> jax.Array:
    return place.first_step + jnp.minimum(step + 1, problem.num_steps - 1)


def _free_previous(scratch: Scratch, step: jax.Array) -> None:
    """Release the stage of the step before, whose products are done."""
    num_stages = scratch.free.shape[0]
    previous = scratch.free.at[lax.rem(step + num_stages - 1, num_stages)]
    pl.when(step > 0)(partial(plgpu.barrier_arrive, previous))
