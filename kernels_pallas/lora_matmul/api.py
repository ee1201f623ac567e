"""The interface of low-rank updates: what each token's own adapter adds to linear modules (arXiv:2106.09685).

Modules that read the same activations, such as the projections of queries, keys and values, have their first factors
one below the other, so that they are multiplied at once.

Factors stay in the stack of all layers, where a layer's are found by an offset: cut out of it they would be copied,
with those of slots that no token has.

Dimension key: T tokens, L layers, S slots (slot s at s - 1), X = L * S, R rank, I inputs, O outputs, G modules with the
same inputs, J = G * R.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kernels_pallas.stacked import Stacked


class LoraModule(NamedTuple):
    """A module that adapters may change, as one device has it.

    Attributes:
        num_inputs, num_outputs: inputs and outputs of the device's shard.
        rank: rank of the factors.
        dtype: dtype of activations and factors.
    """

    num_inputs: int
    num_outputs: int
    rank: int
    dtype: jnp.dtype


class LoraMatmul(Protocol):
    """An implementation of (x A^T) B with the factors of each token's slot, and 0 for slot 0.

    Arrays may be split over the devices of a replica: an adapter's factor with that axis of its base weight (S-LoRA,
    arXiv:2311.03285).
    """

    def plan(self, slot_T: jax.Array, num_slots: int) -> Any:
        """What all layers need to know of the tokens' slots.

        Args:
            slot_T: i32, in [0, S].
            num_slots: S.
        """
        ...

    def shrink(self, x_TI: jax.Array, a: Stacked, plan: Any, *, split: bool) -> jax.Array:
        """Multiply by the first factors: x A^T.

        Args:
            x_TI: activations.
            a: first factors [L, S, J, I], in x's dtype.
            plan: plan of the step's tokens.
            split: the inputs lie over `model`.

        Returns:
            What `expand` takes, in x's dtype; sums are in f32.
        """
        ...

    def expand(self, h: jax.Array, b: Stacked, plan: Any, *, member: int, split: bool) -> jax.Array:
        """The update of one of the modules.

        Args:
            h: from `shrink`.
            b: second factors [L, S, R, O], in h's dtype, the scale in them.
            plan: plan of the step's tokens.
            member: which module, in [0, G).
            split: the outputs lie over `model`.

        Returns:
            [T, O] in h's dtype; sums are in f32.
        """
        ...
