"""Adapters into the weights before anything is served: the model is then as fast as its base."""

from typing import Any

import jax

from jaxserve.lora.delta import AdapterDelta, LoraWeights, add_lora, merge
from jaxserve.models.param_spec import Weights


def merge_adapter(weights: Weights, delta: AdapterDelta) -> Weights:
    """The weights with an adapter in them, in their sharding and, leaf by leaf, in their memory.

    Raises:
        AdapterError: see `merge`.
    """

    def add(base: jax.Array, lora: LoraWeights) -> jax.Array:
        layout: Any = base  # its type does not say so
        return jax.jit(add_lora, donate_argnums=0, out_shardings=layout.format)(base, lora)

    return merge(weights, delta, add)
