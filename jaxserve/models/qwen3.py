"""Qwen3 dense: queries and keys are normalised per head before rotation."""

from collections.abc import Mapping
from typing import Any

from jaxserve.config import ModelConfig
from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.decoder import dense_tensor_names
from jaxserve.models.hf.config import read_dense_config
from jaxserve.models.qwen2 import WINDOW_DEFAULTS


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read `config.json`."""
    return read_dense_config({**WINDOW_DEFAULTS, **config}, qk_norm="head")


ARCHITECTURE = Architecture(read_config=read_config, tensor_names=dense_tensor_names, build=build_decoder)
