"""What splitting a model over devices changes in its weights."""

from typing import NamedTuple


class Parallelism(NamedTuple):
    """How a model's weights differ from its checkpoint's.

    Attributes:
        kv_head_replication: how often each KV head is repeated, where there are fewer of them than devices.
        shared_experts: the replicas of the model share one set of experts (`--enable-dp-attention`).
        kv_scales: keys and values are cached as int8 with per-channel scales, which are measured, not loaded.
    """

    kv_head_replication: int = 1
    shared_experts: bool = False
    kv_scales: bool = False
