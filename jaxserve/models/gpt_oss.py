"""gpt-oss: attention sinks, sliding windows in every other layer, experts in all layers, biases everywhere."""

from collections.abc import Mapping
from typing import Any

import msgspec

from jaxserve.config import ModelConfig, MoeConfig
from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.decoder import dense_tensor_names
from jaxserve.models.hf.config import read_dense_config, read_num_layers, refuse_bad_fields, with_experts
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.param_spec import Path


@refuse_bad_fields
def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read `config.json`."""
    kinds = ("sliding_attention", "full_attention")
    model = read_dense_config(
        # Defaults of gpt-oss's own class for fields that the file lacks.
        {
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
            "sliding_window": 128,
            "layer_types": [kinds[layer % 2] for layer in range(read_num_layers(config))],
            **config,
        },
        attention_bias=True,
        attention_out_bias=True,
    )
    experts = MoeConfig(
        num_experts=int(config.get("num_local_experts", config.get("num_experts", 128))),
        top_k=int(config.get("num_experts_per_tok", config.get("experts_per_token", 4))),
        intermediate_size=model.intermediate_size,
        scores="softmax_of_chosen",
        bias=True,
        swiglu_limit=float(config.get("swiglu_limit", 7.0)),
        swiglu_alpha=float(config.get("swiglu_alpha", 1.702)),
    )
    return with_experts(msgspec.structs.replace(model, attention_sinks=True), experts)


def tensor_names(config: ModelConfig) -> dict[Path, TensorName]:
    """See `Architecture`."""
    names, prefix = dense_tensor_names(config), "model.layers.{layer}.mlp"
    for kind in ("weight", "bias"):
        names["layers", "moe", "router", kind] = TensorName(f"{prefix}.router.{kind}")
    # Rows of gate and up are interleaved in one tensor.
    for own, theirs, row, step in (
        ("gate_proj", "gate_up_proj", 0, 2),
        ("up_proj", "gate_up_proj", 1, 2),
        ("down_proj", "down_proj", 0, 1),
    ):
        path, tensor = ("layers", "moe", "experts", own), f"{prefix}.experts.{theirs}"
        # Quantised tensors are published as [out, in]; unquantised ones are saved as [in, out].
        quantization = config.quantized("experts")
        plain = quantization is None or quantization.element_type != "mxfp4"
        names[*path, "weight"] = TensorName(tensor, row, step, transposed=plain)
        names[*path, "bias"] = TensorName(f"{tensor}_bias", row, step)
    return names


ARCHITECTURE = Architecture(read_config=read_config, tensor_names=tensor_names, build=build_decoder)
