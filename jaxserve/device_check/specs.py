"""What the kernels of one device have to compute for a model."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxserve.layers.moe import router_config
from jaxserve.layout.backends import expert_shapes, linear_shapes
from jaxserve.layout.layout import EngineLayout
from kernels_pallas.grouped_matmul.api import ExpertShape
from kernels_pallas.routing.api import RouterConfig
from kernels_pallas.shards import DATA, EXPERT, model_size

_SCALE_DTYPES = {"e8m0": jnp.uint8, "bfloat16": jnp.bfloat16, "float32": jnp.float32}


class AttentionSpec(NamedTuple):
    """Attention of one device.

    Attributes:
        heads: query heads, key heads, head dim.
        value_dim: channels of a key that are its value, or None; see `AttentionConfig`.
        page_size: tokens per page.
        dtype: dtype of the cache.
        windows: windows of the layers.
        sinks: whether every head has an attention sink.
        context_length: the longest row.
    """

    heads: tuple[int, int, int]
    value_dim: int | None
    page_size: int
    dtype: Any
    windows: tuple[int | None, ...]
    sinks: bool
    context_length: int


class ExpertSpec(NamedTuple):
    """Experts of one device.

    Attributes:
        shapes: shapes of the matrices of one expert.
        num_experts: experts on the device.
        top_k: experts per token.
        routed: experts among which a token's are chosen.
        router: how they are chosen.
        corrected: whether the choice is corrected by biases.
    """

    shapes: tuple[ExpertShape, ...]
    num_experts: int
    top_k: int
    routed: int
    router: RouterConfig
    corrected: bool


class MlaSpec(NamedTuple):
    """Products of heads with their matrices: channels of keys and of values, latent and rotated channels."""

    num_heads: int
    head_rows: int
    latent: int
    rotated: int


class KernelSpecs(NamedTuple):
    """Ops of one device.

    Attributes:
        model: name of the model.
        attention: attention.
        linears: distinct shapes of linear modules, by their names.
        scale_dtype: dtype of the scales of quantised matrices.
        experts: experts, if the model has any.
        mla: MLA's products, if the model has them.
        hidden_size: channels of the norms.
        rope_dim: rotated channels of a head.
        normalized_heads: whether heads are normalised before they are rotated.
        vocab_size: ids of the whole vocabulary.
        max_rows: rows of the widest decode step.
    """

    model: str
    attention: AttentionSpec
    linears: dict[str, ExpertShape]
    scale_dtype: Any
    experts: ExpertSpec | None
    mla: MlaSpec | None
    hidden_size: int
    rope_dim: int
    normalized_heads: bool
    vocab_size: int
    max_rows: int


def specs_of(engine: EngineLayout, model: str) -> KernelSpecs:
    """Return the ops of one device of a laid-out model."""
    step = engine.step
    decoder, mesh = step.decoder, step.mesh
    config = decoder.config
    attention = step.backends.attention.config.split(model_size(mesh))
    quantization = config.quantization
    linears = {shape: path[-1] for path, shape in linear_shapes(decoder, mesh).items()}
    mla = config.mla
    return KernelSpecs(
        model=model,
        attention=AttentionSpec(
            heads=(attention.num_q_heads, attention.num_kv_heads, attention.head_dim),
            value_dim=attention.value_dim,
            page_size=attention.page_size,
            dtype=attention.dtype,
            windows=config.windows,
            sinks=config.attention_sinks,
            context_length=engine.scheduler.context_length,
        ),
        linears={name: shape for shape, name in linears.items()},
        scale_dtype=jnp.float32 if quantization is None else _SCALE_DTYPES[quantization.scale_dtype],
        experts=_experts(engine),
        mla=None
        if mla is None
        else MlaSpec(attention.num_q_heads, mla.qk_nope_head_dim, mla.kv_lora_rank, mla.qk_rope_head_dim),
        hidden_size=config.hidden_size,
        rope_dim=config.rope_dim,
        normalized_heads=config.qk_norm == "head",
        vocab_size=config.vocab_size,
        max_rows=engine.scheduler.max_rows,
    )


def _experts(engine: EngineLayout) -> ExpertSpec | None:
    decoder, mesh = engine.step.decoder, engine.step.mesh
    moe = decoder.config.moe
    if moe is None:
        return None
    replicas = mesh.shape[DATA] if decoder.args.parallelism.shared_experts else 1
    return ExpertSpec(
        shapes=tuple(sorted(expert_shapes(decoder, mesh), key=str)),
        num_experts=moe.num_experts // (mesh.shape[EXPERT] * replicas),
        top_k=moe.top_k,
        routed=moe.num_experts,
        router=router_config(moe),
        corrected=moe.correction,
    )
