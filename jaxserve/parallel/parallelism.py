"""Changes to a model's weights that depend on how it is split over devices."""

from typing import NamedTuple


class Parallelism(NamedTuple):
    """Differences between a model's weights and its checkpoint's.

    Attributes:
        kv_head_replication: number of copies of each KV head, if there are fewer KV heads than devices.
        shared_experts: the replicas of the model share one set of experts (`--enable-dp-attention`).
        kv_scales: keys and values are cached as int8 with per-channel scales, which are measured, not loaded.
    """

    kv_head_replication: int = 1
    shared_experts: bool = False
    kv_scales: bool = False
