"""DeepSeek V3, R1 and Kimi K2: MLA, and experts in groups (arXiv:2412.19437)."""

from collections.abc import Mapping
from typing import Any

import msgspec

from jaxserve.config import MlaConfig, ModelConfig, MoeConfig
from jaxserve.errors import LaunchError
from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.decoder import dense_tensor_names
from jaxserve.models.hf.config import mscale, read_dense_config, refuse_bad_fields, with_experts
from jaxserve.models.hf.supported import check_supported
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.param_spec import Path


@refuse_bad_fields
def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read `config.json`."""
    check_supported(config, scoring_func=("sigmoid",), topk_method=("noaux_tc",))
    experts = MoeConfig(
        **read_experts(config),
        scores="sigmoid",
        normalize=bool(config.get("norm_topk_prob", True)),
        scale=float(config.get("routed_scaling_factor", 2.5)),
        correction=True,
        num_groups=int(config.get("n_group", 8) or 1),
        top_groups=int(config.get("topk_group", 4) or 1),
    )
    mtp = config.get("num_nextn_predict_layers", config.get("num_mtp_layers"))
    model = msgspec.structs.replace(read_mla(config), num_mtp_layers=int(mtp or 0))
    return with_experts(model, experts, range(int(config.get("first_k_dense_replace", 3) or 0)))


def read_mla(config: Mapping[str, Any]) -> ModelConfig:
    """Read a model with MLA, as if all its layers were dense."""
    if int(config.get("moe_layer_freq") or 1) != 1:
        raise LaunchError(f"config.json: moe_layer_freq must be 1, got {config['moe_layer_freq']}")
    q_lora_rank = config.get("q_lora_rank")
    mla = MlaConfig(
        q_lora_rank=None if q_lora_rank is None else int(q_lora_rank),
        kv_lora_rank=int(config["kv_lora_rank"]),
        qk_rope_head_dim=int(config["qk_rope_head_dim"]),
        qk_nope_head_dim=int(config["qk_nope_head_dim"]),
        v_head_dim=int(config["v_head_dim"]),
        interleaved=bool(config.get("rope_interleave", True)),
    )
    model = read_dense_config(
        # One key for all heads: the latent vector and the rotated channels.
        {**config, "num_key_value_heads": 1, "head_dim": mla.kv_lora_rank + mla.qk_rope_head_dim}
    )
    return msgspec.structs.replace(
        model,
        mla=mla,
        attention_scale=(mla.qk_nope_head_dim + mla.qk_rope_head_dim) ** -0.5 * _query_scale(config) ** 2,
    )


def read_experts(config: Mapping[str, Any], num_shared: int = 1) -> dict[str, Any]:
    """Read the sizes of `MoeConfig`; `num_shared` is the default number of shared experts."""
    size, num_shared = int(config["moe_intermediate_size"]), int(config.get("n_shared_experts", num_shared) or 0)
    num_experts = config.get("n_routed_experts", config.get("num_local_experts"))
    return {
        "num_experts": int(config["n_routed_experts"] if num_experts is None else num_experts),
        "top_k": int(config["num_experts_per_tok"]),
        "intermediate_size": size,
        "shared_intermediate_size": size * num_shared or None,
    }


def _query_scale(config: Mapping[str, Any]) -> float:
    """Return the multiplier of queries and of keys for a stretched context."""
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        return 1.0
    return mscale(float(scaling.get("factor") or 1.0), float(scaling.get("mscale_all_dim") or 0.0))


def tensor_names(config: ModelConfig) -> dict[Path, TensorName]:
    """See `Architecture`."""
    names = dense_tensor_names(config)
    attention, mlp = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"
    for name in ("q_proj", "k_proj", "v_proj"):
        for kind in ("weight", "bias"):
            names.pop(("layers", "attention", name, kind), None)
    assert config.mla is not None
    whole = config.mla.q_lora_rank is None
    for name in ("q_proj",) if whole else ("q_a_proj", "q_b_proj"):
        names["layers", "attention", name, "weight"] = TensorName(f"{attention}.{name}.weight")
    names["layers", "attention", "kv_a_proj", "weight"] = TensorName(f"{attention}.kv_a_proj_with_mqa.weight")
    if config.attention_bias:
        names["layers", "attention", "kv_a_proj", "bias"] = TensorName(f"{attention}.kv_a_proj_with_mqa.bias")
        if not whole:
            names["layers", "attention", "q_a_proj", "bias"] = TensorName(f"{attention}.q_a_proj.bias")
    for name in ("kv_a",) if whole else ("q_a", "kv_a"):
        names["layers", "attention", f"{name}_norm", "weight"] = TensorName(f"{attention}.{name}_layernorm.weight")
    names["layers", "attention", "kv_b_proj", "weight"] = TensorName(f"{attention}.kv_b_proj.weight")
    names["layers", "moe", "router", "weight"] = TensorName(f"{mlp}.gate.weight")
    names["layers", "moe", "correction"] = TensorName(f"{mlp}.gate.e_score_correction_bias")
    for name in ("gate_proj", "up_proj", "down_proj"):
        names["layers", "moe", "experts", name, "weight"] = TensorName(f"{mlp}.experts.{{expert}}.{name}.weight")
        shared = TensorName(f"{mlp}.shared_experts.{name}.weight")
        names["layers", "moe", "shared_expert", name, "weight"] = shared
    return names


ARCHITECTURE = Architecture(read_config=read_config, tensor_names=tensor_names, build=build_decoder)
