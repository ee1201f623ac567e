"""RMSNorm on NVIDIA GPUs: a kernel in which a thread block normalises one token, whose channels stay in registers.

XLA would first copy the layer's weight out of the stack of all layers, which is a launch of its own, and one that CUDA
graphs do not capture.

Dimension key: D channels, d channels of a part.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.pallas import plgpu
from kernels_pallas.rms_norm.api import NormWeight
from kernels_pallas.rms_norm.xla.backend import rms_norm
from kernels_pallas.shards import over_model
from kernels_pallas.stacked import Stacked

# Threads of a warpgroup.
_THREADS = 128
# Bytes of activations that a thread loads at once, at most.
_MAX_LOAD = 16
# Channels that fit into the registers of a warpgroup.
_MAX_CHANNELS = 16384


class GpuRmsNorm:
    """A `RmsNorm`.

    Args:
        mesh: the devices; each of them has all channels.
        interpret: parameters of the GPU interpret mode, or False to compile.
    """

    def __init__(self, mesh: Mesh, interpret: Any = False) -> None:
        self._mesh, self._interpret = mesh, interpret

    def __call__(
        self, x_TD: jax.Array, norm: NormWeight, added_TD: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """See `RmsNorm`."""
        if not _THREADS <= norm.weight.stack.shape[1] <= _MAX_CHANNELS or x_TD.dtype != jnp.bfloat16:
            return rms_norm(x_TD, norm, added_TD)

        def run(x_TD: jax.Array, added_TD: jax.Array | None, weight: Stacked) -> tuple[jax.Array, jax.Array]:
            return self._normalize(x_TD, norm._replace(weight=weight), added_TD)

        return over_model(run, self._mesh, P(), P())(x_TD, added_TD, norm.weight)

    def _normalize(self, x_TD: jax.Array, norm: NormWeight, added_TD: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        out = jax.ShapeDtypeStruct((x_TD.shape[0], norm.weight.stack.shape[1]), x_TD.dtype)
        # Every call needs a new function: a function that is reused with another grid keeps its first trace.
        kernel = plgpu.kernel(
            partial(_normalize_row, eps=norm.eps, offset=norm.offset),
            out_type=[out] if added_TD is None else [out, out],
            grid=(x_TD.shape[0],),
            grid_names=("row",),
            kernel_name="rms_norm",
            interpret=self._interpret,
        )
        normalized_TD, *sums = kernel(_Operands(x_TD, added_TD, norm.weight.stack, norm.weight.layer[None]))
        return (sums[0] if sums else x_TD), normalized_TD


class _Operands(NamedTuple):
    x_TD: Any
    added_TD: Any
    weight_LD: Any
    layer_1: Any


class _Part(NamedTuple):
    """Channels that are spread evenly over the threads.

    Attributes:
        columns: the channels.
        num_repeated: number of channels that the part before has too.
        vector: adjacent channels of a thread.
    """

    columns: slice
    num_repeated: int
    vector: int

    def load(self, row: Any) -> jax.Array:
        """Load the part of a row, f32[d]."""
        return plgpu.load(row.at[self.columns], layout=self.layout, optimized=False).astype(jnp.float32)

    @property
    def layout(self) -> Any:
        """The register layout."""
        return plgpu.Layout.WG_STRIDED((self.columns.stop - self.columns.start,), self.vector)


def _parts(num_channels: int, itemsize: int) -> list[_Part]:
    """Split the channels of a row: as many as possible in one part, the rest in a second one that overlaps it."""
    rest = num_channels % _THREADS
    even = num_channels - rest
    vector = next(size for size in (8, 4, 2, 1) if even % (_THREADS * size) == 0 and size * itemsize <= _MAX_LOAD)
    parts = [_Part(slice(0, even), 0, vector)]
    if rest:
        parts.append(_Part(slice(num_channels - _THREADS, num_channels), _THREADS - rest, 1))
    return parts


def _normalize_row(operands: _Operands, out_TD: Any, *sum_TD: Any, eps: float, offset: float) -> None:
    row, num_channels = lax.axis_index("row"), out_TD.shape[1]
    parts = _parts(num_channels, out_TD.dtype.itemsize)
    values: list[jax.Array] = []
    total = jnp.float32(0)
    for part in parts:
        x_d = part.load(operands.x_TD.at[row])
        if sum_TD:
            x_d = (x_d + part.load(operands.added_TD.at[row])).astype(out_TD.dtype)
            plgpu.store(sum_TD[0].at[row, part.columns], x_d, optimized=False)
            x_d = x_d.astype(jnp.float32)
        square_d = x_d * x_d
        if part.num_repeated:
            index_d = plgpu.broadcasted_iota(jnp.int32, square_d.shape, 0, layout=part.layout)
            square_d = jnp.where(index_d >= part.num_repeated, square_d, 0.0)
        values.append(x_d)
        total += jnp.sum(square_d)
    scale = lax.rsqrt(total / num_channels + eps)
    for part, x_d in zip(parts, values, strict=True):
        weight_d = part.load(operands.weight_LD.at[operands.layer_1[0]]) + offset
        plgpu.store(out_TD.at[row, part.columns], (x_d * scale * weight_d).astype(out_TD.dtype), optimized=False)
