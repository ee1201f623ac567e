"""The decoder-only transformer: RMSNorm, rotary grouped-query attention, gated MLP.

NNX modules define each kind of layer. The weights of a child module are stacked along a leading axis over the layers
that have it, and repeating layers are scanned, so a step's program contains each group of layers once. No NNX object
passes through the hot `jit`: the step takes a plain dict of arrays and merges modules only during tracing.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.config import LayerConfig, ModelConfig
from jaxserve.layers.args import DecoderArgs
from jaxserve.layers.attention import Attention
from jaxserve.layers.cached_attention import AttentionCall, PagedAttentionCall
from jaxserve.layers.context import LayerContext, LayerOps, StepLora
from jaxserve.layers.linear import Axes, Embedding, GatedMLP, ParamOptions
from jaxserve.layers.mla import MlaAttention
from jaxserve.layers.mla_prefill import MlaPrefillWorkspace
from jaxserve.layers.moe import MoE
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.rope import rope_angles
from jaxserve.layers.tokenwise import Tiled, Tokenwise, WholeBatch
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.layer_scan import LayerGroup, LayerIndex, LayerStacks, group_layers
from jaxserve.models.param_spec import ParamSpec, Path, Weights, tree_of
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionMeta, Cache, with_window
from kernels_pallas.rope.api import Angles
from kernels_pallas.stacked import Stacked


def hidden_norm(config: ModelConfig, dtype: jnp.dtype) -> RMSNorm:
    """Create a norm of the residual stream, or of a block's output."""
    return RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, offset=config.norm_offset)


def gated_mlp(config: ModelConfig, dtype: jnp.dtype) -> GatedMLP:
    """Create the MLP of a dense layer."""
    c = config
    return GatedMLP(
        c.hidden_size,
        c.intermediate_size,
        bias=c.mlp_bias,
        dtype=dtype,
        activation=c.activation,
        quantization=c.quantized("mlp"),
    )


class Residual(NamedTuple):
    """The residual stream, which is the sum of two arrays [T, D]: the next norm adds them.

    Attributes:
        x_TD: the stream before the last block.
        added_TD: the output of the last block.
    """

    x_TD: jax.Array
    added_TD: jax.Array


class BeforeAttention(NamedTuple):
    """The input of a layer's attention.

    Attributes:
        x_TD: the residual stream.
        q_TNH, k_TKH, v_TKH: queries, keys and values.
    """

    x_TD: jax.Array
    q_TNH: jax.Array
    k_TKH: jax.Array
    v_TKH: jax.Array


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); split around the attention backend."""

    def __init__(self, args: DecoderArgs, layer: LayerConfig) -> None:
        c, dtype = args.config, args.dtype
        self.input_norm = hidden_norm(c, dtype)
        self.attention = Attention(args) if c.mla is None else MlaAttention(args, c.mla)
        self.post_attention_norm = hidden_norm(c, dtype)
        if layer.mlp == "experts":
            self.moe = MoE(args)
        else:
            self.mlp = gated_mlp(c, dtype)
        self._mlp = layer.mlp

    def before_attention(self, residual: Residual, ctx: LayerContext, *rope_TC: jax.Array) -> BeforeAttention:
        """See `Layer`."""
        x_TD, normalized_TD = self.input_norm.after_adding(*residual, ctx)
        return BeforeAttention(x_TD, *self.attention.project(normalized_TD, ctx, *rope_TC))

    def after_attention(self, x_TD: jax.Array, o_TNH: jax.Array, ctx: LayerContext) -> Residual:
        """See `Layer`."""
        x_TD, normalized_TD = self.post_attention_norm.after_adding(x_TD, self.attention.output(o_TNH, ctx), ctx)
        mlp = self.moe if self._mlp == "experts" else self.mlp
        return Residual(x_TD, mlp(normalized_TD, ctx))


class Layer(Protocol):
    """A layer's module, split around the attention backend. Its children are stacked over the layers."""

    @property
    def attention(self) -> Attention | MlaAttention:
        """The projections around the attention backend."""
        ...

    def before_attention(self, residual: Residual, ctx: LayerContext, *rope_TC: jax.Array) -> BeforeAttention:
        """Return the input of the attention; `rope_TC` is cos and sin if the layer uses RoPE."""
        ...

    def after_attention(self, x_TD: jax.Array, o_TNH: jax.Array, ctx: LayerContext) -> Residual:
        """Return the layer's output, from the residual stream before its attention and the attention's result."""
        ...


BuildLayer: TypeAlias = Callable[[DecoderArgs, LayerConfig], Layer]


class _Modules(nnx.Module):
    """Modules of a model outside of its layers."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.norm = hidden_norm(config, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)


class StepOps(NamedTuple):
    """The ops of a step.

    Attributes:
        attention: the attention backend.
        layer: the other ops of layers.
        workspace: workspace for keys and values of MLA prompts, if the step uses the MHA form.
    """

    attention: AttentionBackend
    layer: LayerOps
    workspace: MlaPrefillWorkspace | None = None

    def attention_calls(self, windows: Iterable[int | None], meta: AttentionMeta) -> Mapping[int | None, AttentionCall]:
        """Return the attention call of each window size."""
        if self.workspace is not None:
            return {None: self.workspace.plan(self.attention, meta)}
        backends = (with_window(self.attention, window) for window in windows)
        return {backend.config.window: PagedAttentionCall(backend, backend.plan(meta)) for backend in backends}


class _Step(NamedTuple):
    """Data that the layers of a step share.

    Attributes:
        weights: stacked weights of the layers.
        lora: adapters of the tokens.
        lora_plan: metadata of the tokens' adapter slots.
        live: bool, whether each token is part of the step, as `Tokenwise.prepare` returns it.
        ropes: angles of each rotary embedding by name.
        attention: attention call by window size.
        ops: see `StepOps`.
    """

    weights: Weights
    lora: StepLora
    lora_plan: Any
    live: jax.Array
    ropes: Mapping[str, Angles]
    attention: Mapping[int | None, AttentionCall]
    ops: StepOps


class Decoder:
    """A model's parameter tree and forward pass.

    Args:
        args: arguments of the modules.
        build_layer: makes the module of a layer.
    """

    def __init__(self, args: DecoderArgs, *, build_layer: BuildLayer = DecoderLayer) -> None:
        self.args = args
        self.config = config = args.config
        self.dtype = dtype = args.dtype
        self.tokenwise: Tokenwise = Tiled() if args.batch_invariant else WholeBatch()
        self._build_layer = build_layer
        self._modules: Any = nnx.eval_shape(lambda: _Modules(config, dtype))
        self._kinds: dict[LayerConfig, Any] = {
            kind: nnx.eval_shape(partial(build_layer, args, kind)) for kind in dict.fromkeys(config.layers)
        }
        for module in self._kinds.values():
            _set_paths(module, ("layers",))
        self._stacks = LayerStacks(config.layers, {kind: _children(module) for kind, module in self._kinds.items()})

    def without_kv_scales(self) -> "Decoder":
        """Return the same model with a KV cache that has no scales."""
        parallelism = self.args.parallelism._replace(kv_scales=False)
        return Decoder(self.args._replace(parallelism=parallelism), build_layer=self._build_layer)

    @cached_property
    def param_specs(self) -> dict[Path, ParamSpec]:
        """Specs of all weights, by path in the tree."""
        specs: dict[Path, ParamSpec] = {}

        def add(module: Any, prefix: Path) -> None:
            for path, variable in nnx.to_flat_state(nnx.state(module)):
                layers = self._stacks.layers_with(str(path[0])) if prefix else ()
                lead = (len(layers),) * bool(layers)
                axes: Axes = (*("layers",) * bool(layers), *variable.get_metadata()["logical_axes"])
                value = variable.get_value()
                flags = {name: variable.get_metadata()[name] for name in ParamOptions._fields}
                spec = ParamSpec((*lead, *value.shape), value.dtype, axes, layers, **flags)
                specs[*prefix, *(str(part) for part in path)] = spec

        add(self._modules, ())
        for module in self._kinds.values():
            add(module, ("layers",))
        return specs

    def weight_tree(self, leaf: Callable[[ParamSpec], Any]) -> Weights:
        """Return the tree of weights, with `leaf(spec)` for each weight."""
        return tree_of((path, leaf(spec)) for path, spec in self.param_specs.items())

    def lora_group(self, module: Path) -> tuple[str, ...]:
        """Return the names of `module` and its siblings that read the same activations."""
        parent: Any = self._modules
        if module[0] == "layers":
            parent = self._kinds[self.config.layers[self._stacks.layers_with(module[1])[0]]]
        parent = reduce(getattr, module[module[0] == "layers" : -1], parent)
        groups: tuple[tuple[str, ...], ...] = getattr(parent, "lora_groups", ())
        return next((group for group in groups if module[-1] in group), module[-1:])

    def forward(
        self,
        weights: Weights,
        cache: Cache,
        token_ids_T: jax.Array,
        positions_T: jax.Array,
        meta: AttentionMeta,
        ops: StepOps,
        lora: StepLora,
    ) -> tuple[jax.Array, Cache]:
        """Run the layers over packed tokens; return activations [T, D] before the final norm, and the cache."""
        x_TD = lora.embed(self._merge(weights).embed, token_ids_T)
        if self.config.embedding_scale != 1:
            # The scale is rounded to the dtype, as in the models' training.
            x_TD = x_TD * jnp.asarray(self.config.embedding_scale, x_TD.dtype)
        ropes = {"global": self.config.rope, "local": self.config.local_rope}
        step = _Step(
            weights=weights["layers"],
            lora=lora,
            lora_plan=self.tokenwise.prepare(lora.plan, lora.slots_of(token_ids_T.shape[0])),
            live=self.tokenwise.prepare(
                lambda live_T: live_T, jnp.arange(token_ids_T.shape[0]) < meta.cu_q_lens_B1[-1]
            ),
            ropes={
                name: rope_angles(positions_T, rope, self.config.rope_dim)
                for name, rope in ropes.items()
                if rope is not None
            },
            attention=ops.attention_calls(self.config.windows, meta),
            ops=ops,
        )
        residual = Residual(x_TD, jnp.zeros_like(x_TD))
        for group in group_layers(self.config.layers):
            residual, cache = lax.fori_loop(0, group.repeats, partial(self._run_group, step, group), (residual, cache))
        return residual.x_TD + residual.added_TD, cache

    def _run_group(
        self, step: _Step, group: LayerGroup[LayerConfig], turn: jax.Array, carry: tuple[Residual, Cache]
    ) -> tuple[Residual, Cache]:
        """Run repetition `turn` of the group's layers."""
        for offset in range(len(group.kinds)):
            carry = self._run_layer(step, LayerIndex(group, offset, turn), *carry)
        return carry

    def _run_layer(self, step: _Step, layer: LayerIndex, residual: Residual, cache: Cache) -> tuple[Residual, Cache]:
        graph, _ = nnx.split(self._kinds[layer.kind])
        weights = self._stacks.take(step.weights, layer, self._weight)
        matrices = self._stacks.take(step.lora.layers, layer, lambda _, part: part)
        call = step.attention[layer.kind.window]

        def run(part: Callable[..., Any], *arrays: jax.Array) -> Any:
            def run_tokens(plan: Any, live_T: jax.Array, *arrays: jax.Array) -> Any:
                lora = step.lora.layer(matrices, plan)
                ctx = LayerContext(step.ops.layer, lora, live_T, call.mla)
                return part(nnx.merge(graph, weights), ctx, *arrays)

            return self.tokenwise(run_tokens, *arrays, shared=(step.lora_plan, step.live))

        rope_TC = () if layer.kind.rope is None else step.ropes[layer.kind.rope]

        def before(module: Layer, ctx: LayerContext, x: jax.Array, added: jax.Array, *rope: jax.Array) -> Any:
            return module.before_attention(Residual(x, added), ctx, *rope)

        new: BeforeAttention = run(before, *residual, *rope_TC)
        attention = nnx.merge(graph, weights).attention
        o_TNH, cache = call.attend(attention, new.q_TNH, new.k_TKH, new.v_TKH, cache, layer.number)
        return run(lambda module, ctx, x, o: module.after_attention(x, o, ctx), new.x_TD, o_TNH), cache

    def _weight(self, path: Path, part: Stacked) -> Any:
        spec = self.param_specs.get(path)
        return part if spec is not None and spec.keep_stacked else part.slice()

    def logits(self, weights: Weights, x_BD: jax.Array, lora: StepLora) -> jax.Array:
        """Return logits of the given activations, f32[B, V]; the adapter slots are those of the B rows."""
        modules = self._merge(weights)
        head = modules.embed if self.config.tie_word_embeddings else modules.lm_head

        def score(plan: Any, x_BD: jax.Array) -> jax.Array:
            x_BD = modules.norm.by_xla(x_BD)
            return lora.add_to_logits(head.logits(x_BD), x_BD, plan)

        plan = self.tokenwise.prepare(lora.plan, lora.slots_of(x_BD.shape[0]))
        return self.tokenwise(score, x_BD, shared=(plan,))

    def _merge(self, weights: Weights) -> _Modules:
        graph, _ = nnx.split(self._modules)
        return nnx.merge(graph, {name: part for name, part in weights.items() if name != "layers"})


def _set_paths(module: nnx.Module, prefix: Path) -> None:
    """Set the linear modules' paths in the model's tree, by which a context refers to them."""
    for path, node in nnx.iter_graph(module):
        if hasattr(node, "path"):
            node.path = (*prefix, *map(str, path))


def _children(module: nnx.Module) -> list[str]:
    """Return the names of a layer's children that have weights."""
    return list(dict.fromkeys(str(path[0]) for path, _ in nnx.to_flat_state(nnx.state(module))))


def dense_tensor_names(config: ModelConfig) -> dict[Path, TensorName]:
    """Map the paths in the tree to tensors of Hugging Face checkpoints."""
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
