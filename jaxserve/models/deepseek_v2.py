"""DeepSeek V2 and V2-Lite: V3's layers with softmax routing (arXiv:2405.04434)."""

from collections.abc import Mapping
from typing import Any

from jaxserve.config import ModelConfig, MoeConfig
from jaxserve.errors import LaunchError
from jaxserve.models import deepseek_v3
from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.hf.config import refuse_bad_fields, with_experts
from jaxserve.models.hf.supported import check_supported
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.param_spec import Path


@refuse_bad_fields
def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read `config.json`."""
    check_supported(config, scoring_func=("softmax",), topk_method=("greedy", "group_limited_greedy"))
    if config.get("norm_topk_prob"):
        raise LaunchError("config.json: norm_topk_prob is not supported: DeepSeek's code and transformers' differ")
    grouped = config.get("topk_method") == "group_limited_greedy"
    experts = MoeConfig(
        **deepseek_v3.read_experts(config, num_shared=2),
        normalize=False,
        scale=float(config.get("routed_scaling_factor", 1.0)),
        num_groups=int(config["n_group"]) if grouped else 1,
        top_groups=int(config["topk_group"]) if grouped else 1,
        group_scores=1,
    )
    model = deepseek_v3.read_mla(config)
    return with_experts(model, experts, range(int(config.get("first_k_dense_replace", 0) or 0)))


def tensor_names(config: ModelConfig) -> dict[Path, TensorName]:
    """See `Architecture`."""
    names = deepseek_v3.tensor_names(config)
    del names["layers", "moe", "correction"]
    return names


ARCHITECTURE = Architecture(read_config=read_config, tensor_names=tensor_names, build=build_decoder)
