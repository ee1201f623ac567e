"""SmolLM3: Llama's layers, every fourth without position embedding (NoPE, arXiv:2501.18795)."""

from collections.abc import Mapping
from typing import Any

import msgspec

from jaxserve.config import ModelConfig
from jaxserve.errors import LaunchError
from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.decoder import dense_tensor_names
from jaxserve.models.hf.config import read_dense_config, refuse_bad_fields


@refuse_bad_fields
def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read `config.json`, where `no_rope_layers` is 1 for layers with RoPE."""
    model = read_dense_config({"tie_word_embeddings": True, "use_sliding_window": False, **config})
    if model.windows != (None,) and config.get("layer_types") is None:
        raise LaunchError("config.json: sliding_window without layer_types is not supported by this architecture")
    interval = int(config.get("no_rope_layer_interval", 4))
    rotated = config.get("no_rope_layers") or [(layer + 1) % interval for layer in range(model.num_layers)]
    if len(rotated) != model.num_layers:
        raise LaunchError(f"config.json: {len(rotated)} no_rope_layers for {model.num_layers} layers")
    if not set(rotated) <= {0, 1} and config.get("no_rope_layers"):
        raise LaunchError("config.json: no_rope_layers must be a list of 0 and 1")
    layers = (
        layer if own else msgspec.structs.replace(layer, rope=None)
        for layer, own in zip(model.layers, rotated, strict=True)
    )
    return msgspec.structs.replace(model, layers=tuple(layers))


ARCHITECTURE = Architecture(read_config=read_config, tensor_names=dense_tensor_names, build=build_decoder)
