"""Qwen2 and Qwen2.5: biases on q, k and v only."""

from collections.abc import Mapping
from typing import Any

from jaxserve.config import ModelConfig
from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.decoder import dense_tensor_names
from jaxserve.models.hf.config import read_dense_config

# Defaults of Qwen's own classes for fields that the file lacks.
WINDOW_DEFAULTS: Mapping[str, Any] = {"use_sliding_window": False, "max_window_layers": 28}


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read `config.json`."""
    return read_dense_config({**WINDOW_DEFAULTS, **config}, attention_bias=True, attention_out_bias=False)


ARCHITECTURE = Architecture(read_config=read_config, tensor_names=dense_tensor_names, build=build_decoder)
