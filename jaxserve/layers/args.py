"""Arguments from which the modules of a model are built."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxserve.config import ModelConfig
from jaxserve.parallel.parallelism import Parallelism


class DecoderArgs(NamedTuple):
    """Arguments of a decoder and its layers.

    Attributes:
        config: architecture of the model, from its checkpoint.
        dtype: dtype of weights and activations.
        parallelism: how the weights differ from the checkpoint's.
        batch_invariant: run token-wise computation in fixed tiles, so that a token's result does not depend on how
            many others share its step.
    """

    config: ModelConfig
    dtype: jnp.dtype
    parallelism: Parallelism = Parallelism()
    batch_invariant: bool = False

    @property
    def num_kv_heads(self) -> int:
        """Number of KV heads, including replicated ones."""
        return self.config.num_kv_heads * self.parallelism.kv_head_replication
