"""The interface of low-rank updates: what each token's own adapter adds to a linear module (arXiv:2106.09685).

Dimension key: T tokens, S slots (slot s at s - 1), R rank, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.shards import over_model

# Which axis of the base weight the mesh axis `model` splits; a factor is split with it (S-LoRA, arXiv:2311.03285).
Split: TypeAlias = Literal["inputs", "outputs"] | None


class LoraModule(NamedTuple):
    """A module that adapters may change, as one device has it.

    Attributes:
        num_inputs, num_outputs: of the device's shard.
        rank: of the factors.
        dtype: of activations and factors.
    """

    num_inputs: int
    num_outputs: int
    rank: int
    dtype: jnp.dtype


class LoraMatmul(Protocol):
    """An implementation."""

    def __call__(
        self, x_TI: jax.Array, a_SRI: jax.Array, b_SRO: jax.Array, slot_T: jax.Array, split: Split
    ) -> jax.Array:
        """(x A^T) B of each token's slot, and 0 for slot 0.

        Args:
            x_TI: activations.
            a_SRI: first factors, in x's dtype.
            b_SRO: second factors, in x's dtype, the scale in them.
            slot_T: i32, in [0, S].
            split: how the arrays lie on the mesh.

        Returns:
            [T, O] in x's dtype; sums are in f32, and x A^T is rounded to x's dtype in between.
        """
        ...


def in_two(
    shrink: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    expand: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    mesh: Mesh,
) -> LoraMatmul:
    """A `LoraMatmul` of two kernels, each on one device's shard.

    Args:
        shrink: (x_TI, a_SRI, slot_T) -> f32[T, R].
        expand: (h_TR, b_SRO, slot_T) -> [T, O] in h's dtype.
        mesh: of the devices.
    """

    def matmul(x_TI: jax.Array, a_SRI: jax.Array, b_SRO: jax.Array, slot_T: jax.Array, split: Split) -> jax.Array:
        def run(x_TI: jax.Array, a_SRI: jax.Array, b_SRO: jax.Array, slot_T: jax.Array) -> jax.Array:
            h_TR = shrink(x_TI, a_SRI, slot_T)
            if split == "inputs":
                h_TR = lax.psum(h_TR, "model")
            return expand(h_TR.astype(x_TI.dtype), b_SRO, slot_T)

        inputs = "model" if split == "inputs" else None
        outputs = "model" if split == "outputs" else None
        in_specs = (P(None, inputs), P(None, None, inputs), P(None, None, outputs), P())
        return over_model(run, mesh, in_specs, P(None, outputs))(x_TI, a_SRI, b_SRO, slot_T)

    return matmul
