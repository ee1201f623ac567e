"""The dense decoder-only transformer: RMSNorm, rotary grouped-query attention, SwiGLU.

The NNX modules build and name one layer; the weights of all layers are stacked along a leading axis and the
layers are scanned, so a step's program holds the layer once. Nothing of NNX passes through the hot `jit`: the
step sees a plain dict of arrays and merges modules only while it is traced.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.config import ModelConfig
from jaxserve.lora.apply import NO_ADAPTERS, Adapters
from jaxserve.models.layers import Axes, Embedding, Linear, RMSNorm, SwiGLU
from jaxserve.models.rope import apply_rope, rope_attention_factor, rope_cos_sin, rope_frequencies
from jaxserve.models.tokenwise import AtOnce, InTiles, Tokenwise
from kernels_pallas.paged_attention.api import AttentionBackend, Cache, Plan

Weights: TypeAlias = dict[str, Any]
Path: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class ParamSpec:
    """Shape, dtype and logical axes of one weight; `stacked` weights have all layers along axis 0."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: Axes
    stacked: bool


class Attention(nnx.Module):
    """Projections around the attention backend."""

    same_inputs: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        c = config
        q_size, kv_size = c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q_size, axes=("heads", "hidden"), bias=c.attention_bias, dtype=dtype)
        self.k_proj = Linear(c.hidden_size, kv_size, axes=("kv_heads", "hidden"), bias=c.attention_bias, dtype=dtype)
        self.v_proj = Linear(c.hidden_size, kv_size, axes=("kv_heads", "hidden"), bias=c.attention_bias, dtype=dtype)
        self.o_proj = Linear(q_size, c.hidden_size, axes=("hidden", "heads"), bias=c.attention_out_bias, dtype=dtype)
        self.q_norm = RMSNorm(c.head_dim, eps=c.rms_norm_eps, dtype=dtype) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, eps=c.rms_norm_eps, dtype=dtype) if c.qk_norm else None
        self._head_dim = c.head_dim

    def project(self, x_TD: jax.Array, cos_TC: jax.Array, sin_TC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries and keys, and values: [T, N, H], [T, K, H], [T, K, H]."""
        heads = (x_TD.shape[0], -1, self._head_dim)
        q_TNH, k_TKH = self.q_proj(x_TD).reshape(heads), self.k_proj(x_TD).reshape(heads)
        v_TKH = self.v_proj(x_TD).reshape(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        return apply_rope(q_TNH, cos_TC, sin_TC), apply_rope(k_TKH, cos_TC, sin_TC), v_TKH


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); cut where the attention backend comes in."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        c = config
        self.input_norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, dtype=dtype)
        self.attention = Attention(c, dtype)
        self.post_attention_norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, dtype=dtype)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size, bias=c.mlp_bias, dtype=dtype)

    def before_attention(
        self, x_TD: jax.Array, cos_TC: jax.Array, sin_TC: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of normalised activations."""
        return self.attention.project(self.input_norm(x_TD), cos_TC, sin_TC)

    def after_attention(self, x_TD: jax.Array, o_TNH: jax.Array) -> jax.Array:
        """Output projection and MLP with their residuals."""
        x_TD = x_TD + self.attention.o_proj(o_TNH.reshape(o_TNH.shape[0], -1))
        return x_TD + self.mlp(self.post_attention_norm(x_TD))


class _Modules(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = DecoderLayer(config, dtype)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)


class Decoder:
    """One model's tree and its forward pass.

    Args:
        config: shape of the model.
        dtype: of weights and activations.
        batch_invariant: run token-wise maths in fixed tiles, so that a token's result does not depend on how
            many others share its step.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, batch_invariant: bool = False) -> None:
        self.config = config
        self.tokenwise: Tokenwise = InTiles() if batch_invariant else AtOnce()
        self._frequencies = rope_frequencies(config.rope, config.head_dim)
        self._rope_factor = rope_attention_factor(config.rope)
        self._abstract = nnx.eval_shape(lambda: _Modules(config, dtype))
        self._graph, self._state = nnx.split(self._abstract)

    @cached_property
    def param_specs(self) -> dict[Path, ParamSpec]:
        """Every weight of the tree by its path."""
        specs: dict[Path, ParamSpec] = {}
        for path, variable in nnx.to_flat_state(self._state):
            stacked = path[0] == "layers"
            lead = (self.config.num_layers,) if stacked else ()
            axes: Axes = (*("layers",) * stacked, *variable.get_metadata()["logical_axes"])
            value = variable.get_value()
            specs[tuple(str(part) for part in path)] = ParamSpec((*lead, *value.shape), value.dtype, axes, stacked)
        return specs

    def weight_tree(self, leaf: Callable[[ParamSpec], Any]) -> Weights:
        """The tree with `leaf` of each weight."""
        return tree_of((path, leaf(spec)) for path, spec in self.param_specs.items())

    def same_inputs(self, module: Path) -> tuple[str, ...]:
        """Names of the modules beside `module` that read the same activations, and its own."""
        parent: Any = reduce(getattr, module[:-1], self._abstract)
        names: tuple[str, ...] = getattr(parent, "same_inputs", ())
        return names if module[-1] in names else module[-1:]

    def forward(
        self,
        weights: Weights,
        cache: Cache,
        token_ids_T: jax.Array,
        positions_T: jax.Array,
        plan: Plan,
        attention: AttentionBackend,
        adapters: Adapters = NO_ADAPTERS,
    ) -> tuple[jax.Array, Cache]:
        """Run the layers over packed tokens. Returns normalised activations [T, D] and the cache."""
        modules = self._merge(weights)
        layer_graph, _ = nnx.split(modules.layers)
        x_TD = adapters.embed(modules.embed, token_ids_T)
        cos_TC, sin_TC = rope_cos_sin(positions_T, self._frequencies, self._rope_factor)

        slots = self.tokenwise.prepare(adapters.plan, adapters.slots_of(token_ids_T.shape[0]))

        def body(carry: tuple[jax.Array, Cache, jax.Array], of_layer: tuple[Weights, Weights]) -> tuple[Any, None]:
            x_TD, cache, layer = carry
            layer_weights, layer_bank = of_layer

            def run(part: str, *arrays: jax.Array) -> Any:
                def run_tokens(slots: Any, *arrays: jax.Array) -> Any:
                    module = nnx.merge(layer_graph, layer_weights)
                    adapters.attach(module, layer_bank, slots, ("layers",))
                    return getattr(module, part)(*arrays)

                return self.tokenwise(run_tokens, *arrays, shared=(slots,))

            q_TNH, k_TKH, v_TKH = run("before_attention", x_TD, cos_TC, sin_TC)
            o_TNH, cache = attention.attend(q_TNH, k_TKH, v_TKH, cache, layer, plan)
            x_TD = run("after_attention", x_TD, o_TNH)
            return (x_TD, cache, layer + 1), None

        layers = weights["layers"], adapters.bank.get("layers", {})
        (x_TD, cache, _), _ = lax.scan(body, (x_TD, cache, jnp.int32(0)), layers)
        return x_TD, cache

    def logits(self, weights: Weights, x_BD: jax.Array, adapters: Adapters = NO_ADAPTERS) -> jax.Array:
        """Scores over the vocabulary of the given activations, f32[B, V]; slots are of the B rows."""
        modules = self._merge(weights)
        head = modules.embed if self.config.tie_word_embeddings else modules.lm_head

        def score(slots: Any, x_BD: jax.Array) -> jax.Array:
            x_BD = modules.norm(x_BD)
            return adapters.add_to_logits(head.logits(x_BD), x_BD, slots)

        slots = self.tokenwise.prepare(adapters.plan, adapters.slots_of(x_BD.shape[0]))
        return self.tokenwise(score, x_BD, shared=(slots,))

    def _merge(self, weights: Weights) -> _Modules:
        return nnx.merge(self._graph, weights)


def tree_of(leaves: Iterable[tuple[Path, Any]]) -> Weights:
    """Nested dicts from paths."""
    tree: Weights = {}
    for path, leaf in leaves:
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree


def dense_tensor_names(config: ModelConfig) -> dict[Path, str]:
    """Path in the tree -> Hugging Face tensor name; `{layer}` stands for the layer's number."""
    names: dict[Path, str] = {
        ("embed", "weight"): "model.embed_tokens.weight",
        ("norm", "weight"): "model.norm.weight",
        ("layers", "input_norm", "weight"): "model.layers.{layer}.input_layernorm.weight",
        ("layers", "post_attention_norm", "weight"): "model.layers.{layer}.post_attention_layernorm.weight",
    }
    if not config.tie_word_embeddings:
        names["lm_head", "weight"] = "lm_head.weight"
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        names["layers", "attention", name, "weight"] = f"model.layers.{{layer}}.self_attn.{name}.weight"
    biased: Mapping[str, bool] = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.attention_bias),
        "o_proj": config.attention_out_bias,
    }
    for name, bias in biased.items():
        for kind in ("weight", "bias") if bias else ("weight",):
            names["layers", "attention", name, kind] = f"model.layers.{{layer}}.self_attn.{name}.{kind}"
    for name in ("gate_proj", "up_proj", "down_proj"):
        for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
            names["layers", "mlp", name, kind] = f"model.layers.{{layer}}.mlp.{name}.{kind}"
    return names
