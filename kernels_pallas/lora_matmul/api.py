"""The interface of LoRA matmuls: the updates that each token's adapter adds to linear modules (arXiv:2106.09685).

The A matrices of modules that read the same activations, such as the query, key and value projections, are
concatenated along the rank, so that one product serves them all.

LoRA matrices stay in the stack of all layers, and kernels read a layer's matrices at an offset. Slicing them out of the
stack would copy them, including those of slots that no token uses.

Dimension key: T tokens, L layers, S slots (slot s at index s - 1), X = L * S, R rank, I inputs, O outputs, G modules
with the same inputs, J = G * R.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kernels_pallas.stacked import Stacked


class LoraModule(NamedTuple):
    """The shard on one device of a module that adapters may target.

    Attributes:
        num_inputs, num_outputs: number of inputs and outputs of the device's shard.
        rank: LoRA rank.
        dtype: dtype of activations and LoRA matrices.
    """

    num_inputs: int
    num_outputs: int
    rank: int
    dtype: jnp.dtype


class LoraMatmul(Protocol):
    """An implementation of (x A^T) B with the LoRA matrices of each token's slot, and 0 for slot 0.

    Arrays may be split over the devices of a replica: a LoRA matrix is split along the axis along which its base weight
    is split (S-LoRA, arXiv:2311.03285).
    """

    def plan(self, slot_T: jax.Array, num_slots: int) -> Any:
        """Compute the metadata of the tokens' slots that all layers share.

        Args:
            slot_T: i32, the slot of each token, in [0, S].
            num_slots: S.
        """
        ...

    def shrink(self, x_TI: jax.Array, a: Stacked, plan: Any, *, split: bool) -> jax.Array:
        """Multiply by the A matrices: x A^T.

        Args:
            x_TI: activations.
            a: A matrices [L, S, J, I], in x's dtype.
            plan: plan of the step's tokens.
            split: whether the inputs are split over `model`.

        Returns:
            The argument of `expand`, in x's dtype; sums are in f32.
        """
        ...

    def expand(self, h: jax.Array, b: Stacked, plan: Any, *, member: int, split: bool) -> jax.Array:
        """Compute the update of one of the modules.

        Args:
            h: result of `shrink`.
            b: B matrices [L, S, R, O], in h's dtype, multiplied by the adapters' scales.
            plan: plan of the step's tokens.
            member: index of the module, in [0, G).
            split: whether the outputs are split over `model`.

        Returns:
            [T, O] in h's dtype; sums are in f32.
        """
        ...
