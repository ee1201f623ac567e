"""Qwen3 with experts (arXiv:2505.09388)."""

from collections.abc import Mapping
from typing import Any

from jaxserve.config import ModelConfig
from jaxserve.models import qwen3
from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.hf.config import refuse_bad_fields
from jaxserve.models.qwen2_moe import expert_layers, tensor_names


@refuse_bad_fields
def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read `config.json`."""
    return expert_layers(qwen3.read_config(config), config)


ARCHITECTURE = Architecture(read_config=read_config, tensor_names=tensor_names, build=build_decoder)
