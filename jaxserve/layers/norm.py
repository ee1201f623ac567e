"""RMSNorm (arXiv:1910.07467)."""

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.layers.context import LayerContext
from jaxserve.layers.linear import Axes, ParamOptions, param
from kernels_pallas.rms_norm.api import NormWeight
from kernels_pallas.rms_norm.xla.backend import rms_norm
from kernels_pallas.stacked import Stacked


class RMSNorm(nnx.Module):
    """x / rms(x) * (weight + offset) over the last axis, in f32; returns x's dtype."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype, offset: float = 0.0, axes: Axes = (None,)) -> None:
        self.weight = param((size,), dtype, axes, ParamOptions(keep_stacked=True))
        self._eps = eps
        self._offset = offset

    def __call__(self, x_TD: jax.Array, ctx: LayerContext) -> jax.Array:
        """Normalise activations that every device has entirely; of more channels, the first ones."""
        return ctx.ops.norm(x_TD, self.weights())[1]

    def after_adding(self, x_TD: jax.Array, added_TD: jax.Array, ctx: LayerContext) -> tuple[jax.Array, jax.Array]:
        """Return `x + added`, and the same normalised; every device has all of both."""
        return ctx.ops.norm(x_TD, self.weights(), added_TD)

    def by_xla(self, x: jax.Array) -> jax.Array:
        """Normalise without a kernel: activations of any shape and sharding."""
        return rms_norm(x, self.weights())[1]

    def weights(self) -> NormWeight:
        """Return the weight as kernels take it."""
        value = self.weight.get_value()
        # Norms outside of the layers are not stacked.
        stacked = cast("Stacked", value) if isinstance(value, Stacked) else Stacked(value[None], jnp.int32(0))
        return NormWeight(stacked, self._eps, self._offset)
