"""Adds up the sums of thread blocks that share the inputs, for several matrices in one launch.

XLA would launch a kernel for each matrix. That of a single one it fuses with what uses the result.

Dimension key: as in `gpu/backend.py`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.gpu.results import add_bias, copy_out, round_into
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.token_tiles import Blocks
from kernels_pallas.warpgroup import MATRIX, WARPGROUP_ROWS, smem


class SplitSums(NamedTuple):
    """The sums of several matrices.

    Attributes:
        sums_SOP: f32 sums of each thread block, the outputs of one matrix after those of another.
        biases: [X, O] of each matrix, or None.
        blocks: the blocks of rows.
    """

    sums_SOP: Any
    biases: Sequence[Any]
    blocks: Blocks


def add_up(split: SplitSums, outputs: Sequence[int], dtype: jnp.dtype, interpret: Any) -> list[jax.Array]:
    """Return the results of each matrix, [P, O]; of blocks that are not used they hold arbitrary values.

    Args:
        split: the sums.
        outputs: outputs of each matrix, multiples of 64.
        dtype: a dtype of 16 bits.
        interpret: parameters of the GPU interpret mode, or False to compile.
    """
    num_rows, num_blocks = split.sums_SOP.shape[2], split.blocks.group_C.shape[0]
    # Every call needs a new function: a function that is reused with another grid keeps its first trace.
    kernel = plgpu.kernel(
        partial(_add_block, outputs=tuple(outputs)),
        out_type=[jax.ShapeDtypeStruct((num_rows, size), dtype) for size in outputs],
        scratch_types=[smem((num_rows // num_blocks, WARPGROUP_ROWS), dtype)],
        grid=(sum(outputs) // WARPGROUP_ROWS, num_blocks),
        grid_names=("outputs", "block"),
        kernel_name="add_splits",
        interpret=interpret,
    )
    return kernel(split)


def _add_block(split: SplitSums, *refs: Any, outputs: tuple[int, ...]) -> None:
    *outs, buffer_mo = refs
    at, first = lax.axis_index("outputs") * WARPGROUP_ROWS, 0
    for out_PO, bias_XO, size in zip(outs, split.biases, outputs, strict=True):
        here = (at >= first) & (at < first + size) & (lax.axis_index("block") < split.blocks.num_live)
        pl.when(here)(partial(_add_matrix, split, out_PO, bias_XO, buffer_mo, first))
        first += size


def _add_matrix(split: SplitSums, out_PO: Any, bias_XO: Any, buffer_mo: Any, first: int) -> None:
    """Add up 64 outputs of a matrix, whose outputs start at `first`."""
    block, num_rows = lax.axis_index("block"), buffer_mo.shape[0]
    at, rows = lax.axis_index("outputs") * WARPGROUP_ROWS, pl.ds(block * num_rows, num_rows)
    sum_om = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, num_rows), jnp.float32), MATRIX)
    for part in range(split.sums_SOP.shape[0]):
        part_om = split.sums_SOP.at[part, pl.ds(at, WARPGROUP_ROWS), rows]
        sum_om += plgpu.load(part_om, layout=MATRIX, optimized=False)
    outputs = pl.ds(at - first, WARPGROUP_ROWS)
    bias_O = None if bias_XO is None else bias_XO.at[split.blocks.group_C[block], outputs]
    round_into(add_bias(sum_om, bias_O), buffer_mo)
    copy_out(buffer_mo, out_PO.at[rows, outputs])
