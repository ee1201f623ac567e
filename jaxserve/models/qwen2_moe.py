"""Qwen2 with routed experts and a shared one (Qwen1.5-MoE, Qwen2-57B-A14B; arXiv:2407.10671)."""

from collections.abc import Mapping
from typing import Any

import msgspec

from jaxserve.config import ModelConfig, MoeConfig
from jaxserve.models import qwen2
from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.decoder import dense_tensor_names
from jaxserve.models.hf.config import refuse_bad_fields, with_experts
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.param_spec import Path


def expert_layers(model: ModelConfig, config: Mapping[str, Any]) -> ModelConfig:
    """Return the model with experts in the layers that `config.json` selects."""
    num_experts = config.get("num_experts", config.get("num_local_experts"))
    experts = MoeConfig(
        num_experts=int(config["num_experts"] if num_experts is None else num_experts),
        top_k=int(config["num_experts_per_tok"]),
        intermediate_size=int(config["moe_intermediate_size"]),
        normalize=bool(config.get("norm_topk_prob", False)),
    )
    step = int(config.get("decoder_sparse_step") or 1)
    named: list[int] = config.get("mlp_only_layers") or []
    dense = [layer for layer in range(model.num_layers) if layer in named or (layer + 1) % step]
    return with_experts(model, experts, dense)


@refuse_bad_fields
def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read `config.json`."""
    model = expert_layers(qwen2.read_config(config), config)
    assert model.moe is not None
    shared = int(config["shared_expert_intermediate_size"])
    experts = msgspec.structs.replace(model.moe, shared_intermediate_size=shared, shared_gate=True)
    return msgspec.structs.replace(model, moe=experts)


def tensor_names(config: ModelConfig) -> dict[Path, TensorName]:
    """See `Architecture`."""
    names, prefix = dense_tensor_names(config), "model.layers.{layer}.mlp"
    names["layers", "moe", "router", "weight"] = TensorName(f"{prefix}.gate.weight")
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensor = TensorName(f"{prefix}.experts.{{expert}}.{name}.weight")
        names["layers", "moe", "experts", name, "weight"] = tensor
        if config.moe is not None and config.moe.shared_intermediate_size is not None:
            shared = TensorName(f"{prefix}.shared_expert.{name}.weight")
            names["layers", "moe", "shared_expert", name, "weight"] = shared
    if config.moe is not None and config.moe.shared_intermediate_size is not None:
        names["layers", "moe", "shared_expert_gate", "weight"] = TensorName(f"{prefix}.shared_expert_gate.weight")
    return names


ARCHITECTURE = Architecture(read_config=read_config, tensor_names=tensor_names, build=build_decoder)
