"""Phi 3: Llama's layers; checkpoints fuse q, k, v into one tensor and gate, up into another."""

from functools import partial

from jaxserve.config import ModelConfig
from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.decoder import dense_tensor_names
from jaxserve.models.hf.config import read_dense_config
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.param_spec import Path


def tensor_names(config: ModelConfig) -> dict[Path, TensorName]:
    """See `Architecture`."""
    c, names = config, dense_tensor_names(config)
    queries, keys = c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim
    for name, first_row in (("q_proj", 0), ("k_proj", queries), ("v_proj", queries + keys)):
        fused = TensorName("model.layers.{layer}.self_attn.qkv_proj.weight", first_row)
        names["layers", "attention", name, "weight"] = fused
    for name, first_row in (("gate_proj", 0), ("up_proj", c.intermediate_size)):
        names["layers", "mlp", name, "weight"] = TensorName("model.layers.{layer}.mlp.gate_up_proj.weight", first_row)
    return names


ARCHITECTURE = Architecture(
    read_config=partial(read_dense_config, attention_bias=False, attention_out_bias=False),
    tensor_names=tensor_names,
    build=build_decoder,
)
