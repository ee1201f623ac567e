"""The decoder-only transformer: RMSNorm, rotary grouped-query attention, gated MLP.

The NNX modules build and name each kind of layer. The weights of a layer's child are stacked along a leading axis over
the layers that have it, and layers that repeat are scanned, so a step's program holds each group once. Nothing of NNX
passes through the hot `jit`: the step sees a plain dict of arrays and merges modules only while it is traced.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.config import LayerConfig, ModelConfig
from jaxserve.layers.attention import Attention
from jaxserve.layers.cached_attention import Attend, OverCache
from jaxserve.layers.linear import Axes, Embedding, GatedMLP, InStack, RMSNorm
from jaxserve.layers.mla import MlaAttention
from jaxserve.layers.mla_prefill import MlaPrefillWorkspace
from jaxserve.layers.moe import ExpertOps, MoE
from jaxserve.layers.quantized_linear import LinearOps
from jaxserve.layers.rope import rope_cos_sin
from jaxserve.layers.tokenwise import AtOnce, InTiles, Tokenwise
from jaxserve.lora.ops import NO_ADAPTERS, Adapters
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.layer_groups import LayerGroup, group_layers
from jaxserve.models.param_spec import ParamSpec, Path, Weights, tree_of
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionMeta, Cache, with_window

# Of `param`, which weights of the tree have as well.
_FLAGS = ("in_stack", "taken_apart", "stored")


def hidden_norm(config: ModelConfig, dtype: jnp.dtype) -> RMSNorm:
    """A norm of the residual stream or of what is added to it."""
    return RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, offset=config.norm_offset)


def gated_mlp(config: ModelConfig, dtype: jnp.dtype) -> GatedMLP:
    """The MLP of a dense layer."""
    c = config
    return GatedMLP(
        c.hidden_size,
        c.intermediate_size,
        bias=c.mlp_bias,
        dtype=dtype,
        activation=c.activation,
        quantization=c.quantized("mlp"),
    )


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); cut where the attention backend comes in."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, dtype: jnp.dtype) -> None:
        c = config
        self.input_norm = hidden_norm(c, dtype)
        self.attention = Attention(c, dtype) if c.latent is None else MlaAttention(c, c.latent, dtype)
        self.post_attention_norm = hidden_norm(c, dtype)
        if layer.mlp == "experts":
            self.moe = MoE(c, dtype)
        else:
            self.mlp = gated_mlp(c, dtype)
        self._mlp = layer.mlp

    def before_attention(self, x_TD: jax.Array, *rope_TC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of normalised activations."""
        return self.attention.project(self.input_norm(x_TD), *rope_TC)

    def after_attention(self, x_TD: jax.Array, o_TNH: jax.Array) -> jax.Array:
        """Output projection and MLP with their residuals."""
        x_TD = x_TD + self.attention.output(o_TNH)
        mlp = self.moe if self._mlp == "experts" else self.mlp
        return x_TD + mlp(self.post_attention_norm(x_TD))


class Layer(Protocol):
    """A layer's module, cut where the attention backend comes in. Its children are stacked over the layers."""

    @property
    def attention(self) -> Attention | MlaAttention:
        """Its projections."""
        ...

    def before_attention(self, x_TD: jax.Array, *rope_TC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [T, N, H], keys and values [T, K, H]; `rope_TC` is cos and sin where the layer has positions."""
        ...

    def after_attention(self, x_TD: jax.Array, o_TNH: jax.Array) -> jax.Array:
        """The layer's result, from its input and what attention gave."""
        ...


BuildLayer: TypeAlias = Callable[[ModelConfig, LayerConfig, jnp.dtype], Layer]


class _Modules(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.norm = hidden_norm(config, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)


class Decoder:
    """One model's tree and its forward pass.

    Args:
        config: shape of the model.
        dtype: of weights and activations.
        build_layer: a layer's module.
        batch_invariant: run token-wise maths in fixed tiles, so that a token's result does not depend on how
            many others share its step.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        *,
        build_layer: BuildLayer = DecoderLayer,
        batch_invariant: bool = False,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.tokenwise: Tokenwise = InTiles() if batch_invariant else AtOnce()
        self._abstract: Any = nnx.eval_shape(lambda: _Modules(config, dtype))
        self._kinds: dict[LayerConfig, Any] = {
            kind: nnx.eval_shape(partial(build_layer, config, kind, dtype)) for kind in dict.fromkeys(config.layers)
        }
        # By the name of a layer's child, the layers that have it.
        self._layers: dict[str, tuple[int, ...]] = {
            name: tuple(index for index, kind in enumerate(config.layers) if hasattr(self._kinds[kind], name))
            for module in self._kinds.values()
            for name in _children(module)
        }

    @cached_property
    def param_specs(self) -> dict[Path, ParamSpec]:
        """Every weight of the tree by its path."""
        specs: dict[Path, ParamSpec] = {}

        def add(module: Any, prefix: Path) -> None:
            for path, variable in nnx.to_flat_state(nnx.state(module)):
                layers = self._layers[str(path[0])] if prefix else ()
                lead = (len(layers),) * bool(layers)
                axes: Axes = (*("layers",) * bool(layers), *variable.get_metadata()["logical_axes"])
                value = variable.get_value()
                flags = {name: variable.get_metadata()[name] for name in _FLAGS}
                spec = ParamSpec((*lead, *value.shape), value.dtype, axes, layers, **flags)
                specs[*prefix, *(str(part) for part in path)] = spec

        add(self._abstract, ())
        for module in self._kinds.values():
            add(module, ("layers",))
        return specs

    def weight_tree(self, leaf: Callable[[ParamSpec], Any]) -> Weights:
        """The tree with `leaf` of each weight."""
        return tree_of((path, leaf(spec)) for path, spec in self.param_specs.items())

    def same_inputs(self, module: Path) -> tuple[str, ...]:
        """Names of the modules beside `module` that read the same activations, and its own."""
        parent: Any = self._abstract
        if module[0] == "layers":
            parent = self._kinds[self.config.layers[self._layers[module[1]][0]]]
        parent = reduce(getattr, module[module[0] == "layers" : -1], parent)
        names: tuple[str, ...] = getattr(parent, "same_inputs", ())
        return names if module[-1] in names else module[-1:]

    def forward(
        self,
        weights: Weights,
        cache: Cache,
        token_ids_T: jax.Array,
        positions_T: jax.Array,
        meta: AttentionMeta,
        ops: "StepOps",
        adapters: Adapters = NO_ADAPTERS,
    ) -> tuple[jax.Array, Cache]:
        """Run the layers over packed tokens. Returns activations [T, D] before the last norm, and the cache."""
        x_TD = adapters.embed(self._merge(weights).embed, token_ids_T)
        if self.config.embedding_scale != 1:
            # The scale is rounded to the dtype, as the models were trained with it.
            x_TD = x_TD * jnp.asarray(self.config.embedding_scale, x_TD.dtype)
        ropes = {"global": self.config.rope, "local": self.config.local_rope}
        step = _Step(
            weights=weights["layers"],
            bank=adapters.bank.get("layers", {}),
            adapters=adapters,
            slots=self.tokenwise.prepare(adapters.plan, adapters.slots_of(token_ids_T.shape[0])),
            ropes={
                name: rope_cos_sin(positions_T, rope, self.config.rope_dim)
                for name, rope in ropes.items()
                if rope is not None
            },
            attention=ops.attend(self.config.windows, meta),
            experts=ops.experts,
            linears=ops.linears,
        )
        for group in group_layers(self.config.layers):
            body = partial(self._run_group, step, group)
            (x_TD, cache), _ = lax.scan(body, (x_TD, cache), jnp.arange(group.repeats, dtype=jnp.int32))
        return x_TD, cache

    def _run_group(
        self, step: "_Step", group: LayerGroup[LayerConfig], carry: tuple[jax.Array, Cache], turn: jax.Array
    ) -> tuple[tuple[jax.Array, Cache], None]:
        """Run the group's layers the `turn`-th time."""
        for offset in range(len(group.kinds)):
            carry = self._run_layer(step, _LayerAt(group, offset, turn), *carry)
        return carry, None

    def _run_layer(self, step: "_Step", layer: "_LayerAt", x_TD: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        graph, _ = nnx.split(self._kinds[layer.kind])
        weights = self._of_layer(step.weights, layer, self._of_stack)
        bank = self._of_layer(step.bank, layer, lambda _, place, __, stack: InStack(stack, place))
        attend = step.attention[layer.kind.window]

        def run(part: str, *arrays: jax.Array) -> Any:
            def run_tokens(slots: Any, *arrays: jax.Array) -> Any:
                module = nnx.merge(graph, weights)
                attend.attach(module.attention)
                step.adapters.attach(module, bank, slots, ("layers",))
                if layer.kind.mlp == "experts":
                    module.moe.experts.maths = step.experts
                self._attach_linear_maths(module, step.linears)
                return getattr(module, part)(*arrays)

            return self.tokenwise(run_tokens, *arrays, shared=(step.slots,))

        rope_TC = () if layer.kind.rope is None else step.ropes[layer.kind.rope]
        q_TNH, k_TKH, v_TKH = run("before_attention", x_TD, *rope_TC)
        attention = nnx.merge(graph, weights).attention
        o_TNH, cache = attend.attend(attention, q_TNH, k_TKH, v_TKH, cache, layer.number)
        return run("after_attention", x_TD, o_TNH), cache

    @staticmethod
    def _attach_linear_maths(layer: Any, maths: LinearOps) -> None:
        """Tell the layer's linear modules that have a kernel."""
        for _, *path in maths.modules:
            if hasattr(layer, path[0]):
                reduce(getattr, path, layer).maths = maths

    def _of_layer(self, stacked: Mapping[str, Any], layer: "_LayerAt", take: Callable[..., Any]) -> Weights:
        """A layer's own part of trees that are stacked over the layers that have them.

        Args:
            stacked: by the name of a layer's child.
            layer: which one.
            take: (path of the child, place, path in the child, stack) -> the layer's part of a stack.
        """
        group, own = layer.group, {}
        for name, tree in stacked.items():
            if not hasattr(self._kinds[layer.kind], name):
                continue
            # Its place among those that have it, and how many of them are repeated together.
            first = self._layers[name].index(group.first + layer.offset)
            stride = sum(hasattr(self._kinds[kind], name) for kind in group.kinds)
            place = first + layer.turn * stride
            own[name] = jax.tree_util.tree_map_with_path(partial(take, ("layers", name), place), tree)
        return own

    def _of_stack(self, parent: Path, place: jax.Array, path: tuple[Any, ...], stack: jax.Array) -> Any:
        spec = self.param_specs.get((*parent, *(key.key for key in path)))
        if spec is not None and spec.in_stack:
            return InStack(stack, place)
        return lax.dynamic_index_in_dim(stack, place, keepdims=False)

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
        graph, _ = nnx.split(self._abstract)
        return nnx.merge(graph, {name: part for name, part in weights.items() if name != "layers"})


class StepOps(NamedTuple):
    """What the platform does for a step.

    Attributes:
        attention: the backend.
        experts: how they are computed.
        linears: how quantised linear maps are.
        room: where prompts are expanded, in a step that does so.
    """

    attention: AttentionBackend
    experts: ExpertOps
    linears: LinearOps
    room: MlaPrefillWorkspace | None = None

    def attend(self, windows: Iterable[int | None], meta: AttentionMeta) -> Mapping[int | None, Attend]:
        """How a step attends, by window."""
        if self.room is not None:
            return {None: self.room.plan(self.attention, meta)}
        backends = (with_window(self.attention, window) for window in windows)
        return {backend.config.window: OverCache(backend, backend.plan(meta)) for backend in backends}


class _Step(NamedTuple):
    """What the layers of a step share.

    Attributes:
        weights, bank: stacked over the layers that have them.
        adapters: of the tokens.
        slots: what the tokens' slots decide.
        ropes: cos and sin by name, f32[T, H/2].
        attention: by window.
        experts, linears: see `StepOps`.
    """

    weights: Weights
    bank: Mapping[str, Any]
    adapters: Adapters
    slots: Any
    ropes: Mapping[str, tuple[jax.Array, jax.Array]]
    attention: Mapping[int | None, Attend]
    experts: ExpertOps
    linears: LinearOps


class _LayerAt(NamedTuple):
    """A layer of a group, the `turn`-th time that the group is run."""

    group: LayerGroup[LayerConfig]
    offset: int
    turn: jax.Array

    @property
    def kind(self) -> LayerConfig:
        return self.group.kinds[self.offset]

    @property
    def number(self) -> jax.Array:
        return self.group.first + self.offset + self.turn * len(self.group.kinds)


def _children(module: nnx.Module) -> list[str]:
    """Names of a layer's modules."""
    return list(dict.fromkeys(str(path[0]) for path, _ in nnx.to_flat_state(nnx.state(module))))


def dense_tensor_names(config: ModelConfig) -> dict[Path, TensorName]:
    """Path in the tree -> where Hugging Face's checkpoints have it."""
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
    if config.attention_sinks:
        names["layers", "attention", "sinks"] = "model.layers.{layer}.self_attn.sinks"
    for name in ("gate_proj", "up_proj", "down_proj") if any(layer.mlp == "dense" for layer in config.layers) else ():
        for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
            names["layers", "mlp", name, kind] = f"model.layers.{{layer}}.mlp.{name}.{kind}"
    return {path: TensorName(name) for path, name in names.items()}
