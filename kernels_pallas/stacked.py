"""One layer of an array that stays stacked over layers.

Kernels read such an array at an offset. Sliced out of the stack, a layer's part would be copied in every step.
"""

from typing import NamedTuple

import jax
from jax import lax


class Stacked(NamedTuple):
    """One layer of an array [L, ...].

    Attributes:
        stack: the array of all layers that have such a part.
        layer: i32 scalar, the index of this layer in the stack.
    """

    stack: jax.Array
    layer: jax.Array

    def slice(self) -> jax.Array:
        """The layer's part, [...], copied out of the stack."""
        return lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)

    @property
    def flat(self) -> jax.Array:
        """The first two axes of the stack as one, [L * S, ...]: the S parts of a layer follow each other."""
        return self.stack.reshape(-1, *self.stack.shape[2:])

    @property
    def first(self) -> jax.Array:
        """i32 scalar, the index in `flat` at which the layer's parts begin."""
        return self.layer * self.stack.shape[1]


class LoraPair(NamedTuple):
    """The LoRA matrices of a module, for all slots.

    Attributes:
        a: the first matrices, [L, S, ..., R, in].
        b: the second matrices with the adapters' scales in them, [L, S, ..., R, out].
    """

    a: Stacked
    b: Stacked
