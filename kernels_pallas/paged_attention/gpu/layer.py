"""What the GPU kernels are handed of one layer."""

from typing import NamedTuple

import jax

from kernels_pallas.paged_attention.api import AttentionMeta


class GpuLayer(NamedTuple):
    """One layer on one shard, the step's keys and values written already.

    Attributes:
        keys_PKSH, values_PKSH: pages of all layers; no values where they are a part of their keys.
        first_page: i32, first page of this one.
        meta: the step.
        sinks_N: see `AttentionBackend.attend`.
    """

    keys_PKSH: jax.Array
    values_PKSH: jax.Array | None
    first_page: jax.Array
    meta: AttentionMeta
    sinks_N: jax.Array | None

    @property
    def num_kv_heads(self) -> int:
        """Key heads of the shard."""
        return self.keys_PKSH.shape[1]
