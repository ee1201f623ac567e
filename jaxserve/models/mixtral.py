"""Mixtral: Mistral's layers with experts (arXiv:2401.04088)."""

from collections.abc import Mapping
from typing import Any

from jaxserve.config import ModelConfig, MoeConfig
from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.decoder import dense_tensor_names
from jaxserve.models.hf.config import read_dense_config, refuse_bad_fields, with_experts
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.param_spec import Path


@refuse_bad_fields
def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read `config.json`."""
    # Defaults of Mixtral's own class for fields that the file lacks.
    defaults = {"rms_norm_eps": 1e-5, "rope_theta": 1e6}
    model = read_dense_config({**defaults, **config}, attention_bias=False, attention_out_bias=False)
    experts = MoeConfig(
        num_experts=int(config["num_local_experts"]),
        top_k=int(config["num_experts_per_tok"]),
        intermediate_size=model.intermediate_size,
    )
    return with_experts(model, experts)


def tensor_names(config: ModelConfig) -> dict[Path, TensorName]:
    """See `Architecture`."""
    names, prefix = dense_tensor_names(config), "model.layers.{layer}.block_sparse_moe"
    names["layers", "moe", "router", "weight"] = TensorName(f"{prefix}.gate.weight")
    for own, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        tensor = TensorName(f"{prefix}.experts.{{expert}}.{theirs}.weight")
        names["layers", "moe", "experts", own, "weight"] = tensor
    return names


ARCHITECTURE = Architecture(read_config=read_config, tensor_names=tensor_names, build=build_decoder)
