"""Adapters into the weights before anything is served: the model is then as fast as its base."""

from collections.abc import Mapping
from pathlib import Path

import jax

from checkpoints.orbax_adapters import read_adapter
from checkpoints.source import CheckpointError
from jaxserve.config import ModelConfig
from jaxserve.errors import AdapterError
from jaxserve.lora.delta import AdapterDelta, LowRank, add_low_rank, make_delta, merge
from jaxserve.models.decoder import Decoder, Weights
from jaxserve.models.decoder import Path as TreePath


def read_delta(folder: Path, decoder: Decoder, names: Mapping[TreePath, str], checkpoint: ModelConfig) -> AdapterDelta:
    """Read an adapter folder for a model; see `make_delta`.

    Raises:
        AdapterError: it cannot be read, or does not fit.
    """
    try:
        return make_delta(read_adapter(folder), decoder, names, checkpoint)
    except CheckpointError as error:
        raise AdapterError(str(error)) from None


def merge_adapter(weights: Weights, delta: AdapterDelta) -> Weights:
    """The weights with an adapter in them, in their sharding and, leaf by leaf, in their memory.

    Raises:
        AdapterError: see `merge`.
    """

    def add(base: jax.Array, factor: LowRank) -> jax.Array:
        return jax.jit(add_low_rank, donate_argnums=0, out_shardings=base.sharding)(base, factor)

    return merge(weights, delta, add)
