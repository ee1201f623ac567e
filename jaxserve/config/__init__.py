"""Frozen config structs, validated on construction and passed to components in parts.

Nothing here reads files, the environment or a device; `jaxserve.arguments` builds the structs from flags.
"""

from jaxserve.config.engine import (
    CacheConfig,
    EngineConfig,
    KvCacheDtype,
    LoraConfig,
    LoraEvictionPolicy,
    SchedulePolicy,
    SchedulerConfig,
    adapter_name_problem,
)
from jaxserve.config.model import (
    Activation,
    Dtype,
    LayerConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    QuantizationConfig,
    QuantizedPart,
    RopeConfig,
    RouterScores,
)
from jaxserve.config.serve import HttpConfig, ModelFiles, OutputConfig, ServeConfig

__all__ = [
    "Activation",
    "CacheConfig",
    "Dtype",
    "EngineConfig",
    "HttpConfig",
    "KvCacheDtype",
    "LayerConfig",
    "LoraConfig",
    "LoraEvictionPolicy",
    "MlaConfig",
    "ModelConfig",
    "ModelFiles",
    "MoeConfig",
    "OutputConfig",
    "QuantizationConfig",
    "QuantizedPart",
    "RopeConfig",
    "RouterScores",
    "SchedulePolicy",
    "SchedulerConfig",
    "ServeConfig",
    "adapter_name_problem",
]
