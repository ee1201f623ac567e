"""One layer of an array that stays stacked over layers.

Kernels read such an array at an offset: slicing a layer out of the stack would copy it in every step.
"""

from typing import NamedTuple

import jax
from jax import lax


class Stacked(NamedTuple):
    """One layer of an array [L, ...].

    Attributes:
        stack: the array, over all layers that have it.
        layer: i32 scalar, the index of this layer in the stack.
    """

    stack: jax.Array
    layer: jax.Array

    def slice(self) -> jax.Array:
        """Return this layer of the array, [...]."""
        return lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False, allow_negative_indices=False)

    @property
    def flat(self) -> jax.Array:
        """The stack with its first two axes merged, [L * S, ...]; the S entries of a layer are consecutive."""
        return self.stack.reshape(-1, *self.stack.shape[2:])

    @property
    def first(self) -> jax.Array:
        """i32 scalar, the index in `flat` of the layer's first entry."""
        return self.layer * self.stack.shape[1]


class LoraPair(NamedTuple):
    """The LoRA A and B matrices of a module, for all slots.

    Attributes:
        a: A matrices, [L, S, ..., R, in].
        b: B matrices, multiplied by the adapters' scales, [L, S, ..., R, out].
    """

    a: Stacked
    b: Stacked
