"""Merges adapters into the weights at start-up, so that the model is as fast as its base."""

from typing import Any

import jax

from jaxserve.lora.delta import AdapterDelta, LoraWeights, add_lora, merge
from jaxserve.models.param_spec import Weights


def merge_adapter(weights: Weights, delta: AdapterDelta) -> Weights:
    """Return the weights with an adapter merged, with the same sharding and, leaf by leaf, in the same memory.

    Raises:
        AdapterError: see `merge`.
    """

    def add(base: jax.Array, lora: LoraWeights) -> jax.Array:
        layout: Any = base  # the type of jax.Array lacks `format`
        return jax.jit(add_lora, donate_argnums=0, out_shardings=layout.format)(base, lora)

    return merge(weights, delta, add)
