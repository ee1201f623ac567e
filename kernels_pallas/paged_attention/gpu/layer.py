"""Inputs of the GPU attention kernels for one layer."""

from typing import NamedTuple

import jax

from kernels_pallas.paged_attention.api import AttentionMeta


class GpuLayer(NamedTuple):
    """One layer on one shard, after the step's keys and values have been written.

    Attributes:
        keys_PKSH, values_PKSH: pages of all layers; `values_PKSH` is None where values are part of the keys.
        number: i32, index of the layer.
        meta: metadata of the step.
        sinks_N: see `AttentionBackend.attend`.
    """

    keys_PKSH: jax.Array
    values_PKSH: jax.Array | None
    number: jax.Array
    meta: AttentionMeta
    sinks_N: jax.Array | None

    @property
    def num_kv_heads(self) -> int:
        """Key heads of the shard."""
        return self.keys_PKSH.shape[1]
