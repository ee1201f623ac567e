"""OLMo 2: norms after the blocks instead of before, and QK norms over whole projections (arXiv:2501.00656)."""

from functools import partial

import jax
from flax import nnx

from jaxserve.config import LayerConfig, ModelConfig
from jaxserve.layers.args import DecoderArgs
from jaxserve.layers.attention import Attention
from jaxserve.layers.context import LayerContext
from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.decoder import BeforeAttention, Residual, dense_tensor_names, gated_mlp, hidden_norm
from jaxserve.models.hf.config import read_dense_config
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.param_spec import Path


class Olmo2Layer(nnx.Module):
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(self, args: DecoderArgs, _: LayerConfig) -> None:
        config, dtype = args.config, args.dtype
        self.attention = Attention(args)
        self.post_attention_norm = hidden_norm(config, dtype)
        self.mlp = gated_mlp(config, dtype)
        self.post_feedforward_norm = hidden_norm(config, dtype)

    def before_attention(self, residual: Residual, ctx: LayerContext, *rope_TC: jax.Array) -> BeforeAttention:
        """See `Layer`."""
        x_TD = residual.x_TD + residual.added_TD
        return BeforeAttention(x_TD, *self.attention.project(x_TD, ctx, *rope_TC))

    def after_attention(self, x_TD: jax.Array, o_TNH: jax.Array, ctx: LayerContext) -> Residual:
        """See `Layer`."""
        x_TD = x_TD + self.post_attention_norm(self.attention.output(o_TNH, ctx), ctx)
        return Residual(x_TD, self.post_feedforward_norm(self.mlp(x_TD, ctx), ctx))


def tensor_names(config: ModelConfig) -> dict[Path, TensorName]:
    """See `Architecture`."""
    names = dense_tensor_names(config)
    del names["layers", "input_norm", "weight"]
    names["layers", "post_feedforward_norm", "weight"] = TensorName(
        "model.layers.{layer}.post_feedforward_layernorm.weight"
    )
    return names


ARCHITECTURE = Architecture(
    read_config=partial(read_dense_config, qk_norm="projection"),
    tensor_names=tensor_names,
    build=partial(build_decoder, build_layer=Olmo2Layer),
)
