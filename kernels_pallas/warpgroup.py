"""Helpers for warpgroups of Hopper GPUs: matrix products, shared memory and register layouts, pipelines, barriers.

Needs JAX 0.11 or newer, as `kernels_pallas.pallas` does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.pallas import pl, plgpu

# Rows of a wgmma product, fixed by the hardware.
WARPGROUP_ROWS = 64
# Register layouts of a wgmma result, and of one value per row or column of it.
MATRIX = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)

_MIN_SWIZZLE = 32


def smem(shape: tuple[int, ...], dtype: Any, like: int | None = None) -> Any:
    """Return a shared memory type in the tiled, swizzled layout that wgmma reads; the last two axes are tiled.

    Args:
        shape: shape of the array.
        dtype: dtype of the array.
        like: columns of the other operand of the product, if it has fewer: both must have the same swizzle.
    """
    bits = jnp.dtype(dtype).itemsize * 8
    # With a wider swizzle than 64 bytes, 8-bit arrays could not be read in chunks of 64 columns.
    swizzle = min(plgpu.find_swizzle((like or shape[-1]) * bits), 64 if bits == 8 else 128)
    if swizzle < _MIN_SWIZZLE:
        return plgpu.SMEM(shape, dtype)
    transforms = (
        plgpu.TilingTransform((8, 8 * swizzle // bits)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def product(left: Any, right: Any, width: int) -> jax.Array:
    """Multiply [64, k] by [k, width], both in shared memory; the result is f32."""

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, width), jnp.float32))


def arrive_and_wait(barrier: Any) -> None:
    """Arrive at a barrier, and wait until all warpgroups that share it have arrived."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def broadcast_rows(x_m: jax.Array, width: int) -> jax.Array:
    """Broadcast one value per row across the `width` columns."""
    return lax.broadcast_in_dim(x_m, (WARPGROUP_ROWS, width), [0])


class Stages(NamedTuple):
    """A pipeline that copies the operands of later steps while earlier ones are computed.

    A stage is free again when the work of its step is done.

    Attributes:
        num_steps: number of steps.
        copy: `copy(step, stage)` starts copying the operands of a step.
        arrived: barriers, one per stage.
    """

    num_steps: jax.Array | int
    copy: Callable[[jax.Array, jax.Array], None]
    arrived: Any

    def start(self) -> None:
        """Start the copies of the first steps."""
        for step in range(self.arrived.shape[0] - 1):
            pl.when(step < self.num_steps)(partial(self.copy, jnp.int32(step), jnp.int32(step)))

    def next(self, step: jax.Array) -> jax.Array:
        """Wait for the operands of a step and return its stage; the previous step's work must be done."""
        num_stages = self.arrived.shape[0]
        ahead = step + num_stages - 1
        pl.when(ahead < self.num_steps)(partial(self.copy, ahead, lax.rem(ahead, num_stages)))
        stage = lax.rem(step, num_stages)
        plgpu.barrier_wait(self.arrived.at[stage])
        return stage
