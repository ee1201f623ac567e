"""Gemma 3 text models: sliding windows with their own rotary base in most layers, and norms around every block."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import msgspec
from flax import nnx

from jaxserve.config import LayerConfig, ModelConfig
from jaxserve.errors import LaunchError
from jaxserve.layers.args import DecoderArgs
from jaxserve.layers.attention import Attention
from jaxserve.layers.context import LayerContext
from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.decoder import BeforeAttention, Residual, dense_tensor_names, gated_mlp, hidden_norm
from jaxserve.models.hf.config import read_dense_config, read_num_layers, read_rope, refuse_bad_fields
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.param_spec import Path


class Gemma3Layer(nnx.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, args: DecoderArgs, _: LayerConfig) -> None:
        config, dtype = args.config, args.dtype
        self.attention = Attention(args)
        self.mlp = gated_mlp(config, dtype)
        self.input_norm = hidden_norm(config, dtype)
        self.post_attention_norm = hidden_norm(config, dtype)
        self.pre_feedforward_norm = hidden_norm(config, dtype)
        self.post_feedforward_norm = hidden_norm(config, dtype)

    def before_attention(self, residual: Residual, ctx: LayerContext, *rope_TC: jax.Array) -> BeforeAttention:
        """See `Layer`."""
        x_TD, normalized_TD = self.input_norm.after_adding(*residual, ctx)
        return BeforeAttention(x_TD, *self.attention.project(normalized_TD, ctx, *rope_TC))

    def after_attention(self, x_TD: jax.Array, o_TNH: jax.Array, ctx: LayerContext) -> Residual:
        """See `Layer`."""
        attended_TD = self.post_attention_norm(self.attention.output(o_TNH, ctx), ctx)
        x_TD, normalized_TD = self.pre_feedforward_norm.after_adding(x_TD, attended_TD, ctx)
        return Residual(x_TD, self.post_feedforward_norm(self.mlp(normalized_TD, ctx), ctx))


@refuse_bad_fields
def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read `config.json`; files from before transformers 5 have other fields for local RoPE and the layer pattern."""
    ropes = dict(config.get("rope_parameters") or {})
    if not ropes:
        ropes = {
            "full_attention": {"rope_theta": config.get("rope_theta", 1e6), **(config.get("rope_scaling") or {})},
            "sliding_attention": {"rope_theta": config.get("rope_local_base_freq", 1e4)},
        }
    if ropes.keys() != {"full_attention", "sliding_attention"}:
        raise LaunchError("config.json: rope_parameters must have full_attention and sliding_attention")
    scale = float(config.get("query_pre_attn_scalar", 256))
    if not scale > 0:
        raise LaunchError(f"config.json: query_pre_attn_scalar must be positive, got {scale}")
    kinds = config.get("layer_types")
    if kinds is None:
        period = int(config.get("sliding_window_pattern", 6))
        kinds = [
            "sliding_attention" if (layer + 1) % period else "full_attention"
            for layer in range(read_num_layers(config))
        ]
    model = read_dense_config(
        # Defaults of Gemma's own class for fields that the file lacks.
        {
            "tie_word_embeddings": True,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 4096,
            **config,
            "layer_types": kinds,
            "rope_parameters": {"rope_theta": 1e6, **ropes["full_attention"]},
        },
        qk_norm="head",
    )
    return msgspec.structs.replace(
        model,
        layers=tuple(
            msgspec.structs.replace(layer, rope="global" if kind == "full_attention" else "local")
            for layer, kind in zip(model.layers, kinds, strict=True)
        ),
        local_rope=read_rope({"rope_parameters": ropes["sliding_attention"]}, model.max_position),
        embedding_scale=model.hidden_size**0.5,
        attention_scale=scale**-0.5,
        norm_offset=1.0,
    )


def tensor_names(config: ModelConfig) -> dict[Path, TensorName]:
    """See `Architecture`."""
    names = dense_tensor_names(config)
    for name in ("pre_feedforward", "post_feedforward"):
        names["layers", f"{name}_norm", "weight"] = TensorName(f"model.layers.{{layer}}.{name}_layernorm.weight")
    return names


ARCHITECTURE = Architecture(
    read_config=read_config, tensor_names=tensor_names, build=partial(build_decoder, build_layer=Gemma3Layer)
)
