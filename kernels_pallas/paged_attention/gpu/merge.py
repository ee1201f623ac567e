"""Merge of the partial softmaxes of rows that run one token.

A thread block merges the items of one row for one key head and a part of the channels, in order, so that the result
does not depend on which item was finished first.

Dimension key: see `decode`; v channels of one thread block, m rows of its tile (64, of which G are used).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.paged_attention.common.partial_softmax import MASKED
from kernels_pallas.paged_attention.gpu.softmax import LOG2E
from kernels_pallas.pallas import pl, plgpu
from kernels_pallas.warpgroup import MATRIX, ROWS, WARPGROUP_ROWS, Stages, broadcast_rows, smem

_STAGES = 4
_MAX_WIDTH = 128
_RESULT_BYTES = 2
# Bulk copies start at multiples of this many bytes of shared memory.
_ALIGNMENT = 128


class _Inputs(NamedTuple):
    """Operands of the kernel, in order: see `DecodeOutputs`; `sinks_Xm` in base 2, or None."""

    out_WKGH: Any
    max_WKG: Any
    sum_WKG: Any
    end_B: Any
    sinks_Xm: Any


class MergedShape(NamedTuple):
    """What is merged.

    Attributes:
        group: query heads of a key head, without padding.
        out_dim: V, the number of channels.
        together: key heads whose queries are in the same rows, one after the other.
    """

    group: int
    out_dim: int
    together: int


class _Scratch(NamedTuple):
    out: Any
    row_max: Any
    row_sum: Any
    arrived: Any
    result: Any


class _Merged(NamedTuple):
    """A merge in progress: maximum and sum of weights [m], weighted mean [m, v]."""

    row_max: jax.Array
    row_sum: jax.Array
    out: jax.Array


def merge_parts(
    parts: tuple[jax.Array, jax.Array, jax.Array],
    end_B: jax.Array,
    sinks_XG: jax.Array | None,
    shape: MergedShape,
    interpret: Any = False,
) -> jax.Array:
    """Return the results of all rows, bf16[B, K, heads, V]; 0 for rows without items.

    Args:
        parts: means, maxima and sums of weights; see `DecodeOutputs`.
        end_B: i32, the end of each row's items.
        sinks_XG: the heads' sinks, see `AttentionBackend.attend`, by blocks of key heads whose queries are together.
        shape: what is merged.
        interpret: parameters of the GPU interpret mode, or False to compile.
    """
    out_WKGH, out_dim = parts[0], shape.out_dim
    num_kv_heads = out_WKGH.shape[1]
    width = _width(out_dim)
    sinks_Xm = None
    if sinks_XG is not None:
        padding = ((0, 0), (0, WARPGROUP_ROWS - sinks_XG.shape[1]))
        sinks_Xm = jnp.pad(sinks_XG.astype(jnp.float32) * LOG2E, padding)
    stats = plgpu.SMEM((_STAGES, WARPGROUP_ROWS), jnp.float32)
    kernel = plgpu.kernel(
        partial(_merge, width=width, together=shape.together),
        out_type=jax.ShapeDtypeStruct((end_B.shape[0], num_kv_heads, shape.group, out_dim), jnp.bfloat16),
        scratch_types=[
            _Scratch(
                out=smem((_STAGES, WARPGROUP_ROWS, width), out_WKGH.dtype),
                row_max=stats,
                row_sum=stats,
                arrived=plgpu.Barrier(num_arrivals=3, num_barriers=_STAGES),
                # Without tiles of eight rows, so that any number of heads can be copied.
                result=plgpu.SMEM((WARPGROUP_ROWS, width), jnp.bfloat16),
            )
        ],
        grid=(out_dim // width, num_kv_heads, end_B.shape[0]),
        grid_names=("part", "head", "row"),
        kernel_name="merge_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return kernel(_Inputs(*parts, end_B, sinks_Xm))


def can_start_at(group: int, out_dim: int) -> bool:
    """Return whether the results of a group can start at any multiple of the group's rows in shared memory."""
    return group * _width(out_dim) * _RESULT_BYTES % _ALIGNMENT == 0


def _width(out_dim: int) -> int:
    """Return the number of channels of one thread block."""
    return _MAX_WIDTH if out_dim % _MAX_WIDTH == 0 else out_dim


def _merge(inputs: _Inputs, out_BKGV: Any, scratch: _Scratch, *, width: int, together: int) -> None:
    row, head = lax.axis_index("row"), lax.axis_index("head")
    first = jnp.where(row == 0, 0, inputs.end_B[jnp.maximum(row - 1, 0)])
    columns = pl.ds(lax.axis_index("part") * width, width)
    group = pl.ds(0, inputs.max_WKG.shape[2])

    def copy(step: jax.Array, stage: jax.Array) -> None:
        item, arrived = first + step, scratch.arrived.at[stage]
        part = inputs.out_WKGH.at[item, head, :, columns]
        plgpu.copy_gmem_to_smem(part, scratch.out.at[stage, group], arrived)
        plgpu.copy_gmem_to_smem(inputs.max_WKG.at[item, head], scratch.row_max.at[stage, group], arrived)
        plgpu.copy_gmem_to_smem(inputs.sum_WKG.at[item, head], scratch.row_sum.at[stage, group], arrived)

    stages = Stages(inputs.end_B[row] - first, copy, scratch.arrived)
    stages.start()

    def add(step: jax.Array, merged: _Merged) -> _Merged:
        stage = stages.next(step)
        part_max_m = plgpu.load(scratch.row_max.at[stage], layout=ROWS)
        max_m = jnp.maximum(merged.row_max, part_max_m)
        old_m = jnp.exp2(merged.row_max - max_m)
        new_m = plgpu.load(scratch.row_sum.at[stage], layout=ROWS) * jnp.exp2(part_max_m - max_m)
        part_mv = plgpu.load(scratch.out.at[stage], layout=MATRIX).astype(jnp.float32)
        out_mv = merged.out * broadcast_rows(old_m, width) + part_mv * broadcast_rows(new_m, width)
        return _Merged(max_m, merged.row_sum * old_m + new_m, out_mv)

    def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    rows = (WARPGROUP_ROWS,)
    merged = _Merged(full(rows, MASKED, ROWS), full(rows, 0, ROWS), full((WARPGROUP_ROWS, width), 0, MATRIX))
    merged = lax.fori_loop(0, stages.num_steps, add, merged)
    row_sum_m, scale_m = merged.row_sum, jnp.float32(1)
    if inputs.sinks_Xm is not None:
        sink_m = plgpu.load(inputs.sinks_Xm.at[lax.div(head, together)], layout=ROWS, optimized=False)
        max_m = jnp.maximum(merged.row_max, sink_m)
        scale_m = jnp.exp2(merged.row_max - max_m)
        row_sum_m = row_sum_m * scale_m + jnp.exp2(sink_m - max_m)
    factor_m = jnp.where(row_sum_m > 0, scale_m / row_sum_m, 0.0)
    scratch.result[...] = (merged.out * broadcast_rows(factor_m, width)).astype(jnp.bfloat16)
    plgpu.commit_smem()
    own = pl.ds(0 if together == 1 else lax.rem(head, together) * out_BKGV.shape[2], out_BKGV.shape[2])
    plgpu.copy_smem_to_gmem(scratch.result.at[own], out_BKGV.at[row, head, :, columns])
    plgpu.wait_smem_to_gmem(0)
