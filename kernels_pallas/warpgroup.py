"""A warpgroup of a Hopper GPU: the matrices it multiplies, where they lie, what it knows by rows and waits for.

Needs JAX 0.11 or newer, as `kernels_pallas.pallas` does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.pallas import pl, plgpu

# Rows of a warpgroup's matrix product, fixed by the hardware.
WARPGROUP_ROWS = 64
# How results lie in its registers, and one number for each of their rows.
MATRIX = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)

_MIN_SWIZZLE = 32


def smem(shape: tuple[int, ...], dtype: Any, like: int | None = None) -> Any:
    """Shared memory in the tiled, swizzled form that the tensor cores read; tiled over the last two axes.

    Args:
        shape: shape of the array.
        dtype: dtype of the array.
        like: columns of the array that it is multiplied with, where those are fewer: both must be swizzled alike.
    """
    bits = jnp.dtype(dtype).itemsize * 8
    # Wider than 64 bytes, stretches of 8-bit numbers could not be read in pieces of 64 columns.
    swizzle = min(plgpu.find_swizzle((like or shape[-1]) * bits), 64 if bits == 8 else 128)
    if swizzle < _MIN_SWIZZLE:
        return plgpu.SMEM(shape, dtype)
    transforms = (
        plgpu.TilingTransform((8, 8 * swizzle // bits)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def product(left: Any, right: Any, width: int) -> jax.Array:
    """[64, k] times [k, width], f32, of operands in shared memory."""

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, width), jnp.float32))


def meet(barrier: Any) -> None:
    """Wait until all warpgroups that share a barrier are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def along_rows(x_m: jax.Array, width: int) -> jax.Array:
    """The same value across each row."""
    return lax.broadcast_in_dim(x_m, (WARPGROUP_ROWS, width), [0])


class Stages(NamedTuple):
    """Steps whose operands arrive while those before are worked on; a step's stage is free when its work is done.

    Attributes:
        num_steps: how many there are.
        copy: (step, stage): sends for the operands of a step.
        arrived: barriers of the stages.
    """

    num_steps: jax.Array | int
    copy: Callable[[jax.Array, jax.Array], None]
    arrived: Any

    def start(self) -> None:
        """Send for the first steps."""
        for step in range(self.arrived.shape[0] - 1):
            pl.when(step < self.num_steps)(partial(self.copy, jnp.int32(step), jnp.int32(step)))

    def next(self, step: jax.Array) -> jax.Array:
        """Wait for a step, the work of the one before being done; returns its stage."""
        num_stages = self.arrived.shape[0]
        ahead = step + num_stages - 1
        pl.when(ahead < self.num_steps)(partial(self.copy, ahead, lax.rem(ahead, num_stages)))
        stage = lax.rem(step, num_stages)
        plgpu.barrier_wait(self.arrived.at[stage])
        return stage
