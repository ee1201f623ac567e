"""How the devices of a replica share experts if the user does not say it."""

from collections.abc import Mapping
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.models.registry import find_architecture

# TPUs keep arrays in rows of this many elements: a shorter last axis is padded, in memory and in products. Blocks of
# scales are as wide. A shard has two of them: next to one, the padding of an expert's tokens is an eighth of the bytes.
_LANES = 128


def choose_ep_size(config: EngineConfig, hf_config: Mapping[str, Any], platform: str) -> int:
    """Return `ep_size`: as few groups as possible, on TPU with shards of experts that fill whole rows of lanes.

    Args:
        config: the settings, of which `ep_size` may be None.
        hf_config: the parsed `config.json`.
        platform: platform of the devices, by JAX's name.
    """
    if config.ep_size is not None:
        return config.ep_size
    model = find_architecture(hf_config).model_config(hf_config)
    experts, quantization = model.moe, model.quantized("experts")
    if experts is None or platform != "tpu":
        return 1
    width = _LANES * (2 if quantization is not None and quantization.block[0] > 1 else 1)
    replicas = config.dp_size if config.dp_attention else 1
    sizes = (size for size in range(1, config.tp_size + 1) if config.tp_size % size == 0)
    whole = (
        size
        for size in sizes
        if experts.num_experts % (size * replicas) == 0
        and experts.intermediate_size % (config.tp_size // size * width) == 0
    )
    return next(whole, 1)
