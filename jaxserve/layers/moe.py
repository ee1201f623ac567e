"""Mixture of experts: a router sends each token to a few of many MLPs (arXiv:1701.06538, arXiv:2101.03961).

Tokens are sorted by expert once, multiplied in blocks that have one expert each, and put back in order. Every device
holds some of the experts, or a shard of each, and the outputs are summed over devices.

Dimension key: E experts, U experts of a token, F hidden size of an expert, P rows of the experts' blocks, Q rows of the
blocks by adapter.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxserve.config import ModelConfig, MoeConfig, QuantizationConfig
from jaxserve.layers.args import DecoderArgs
from jaxserve.layers.context import ExpertAdapters, LayerContext, Path
from jaxserve.layers.linear import ACTIVATIONS, Axes, GatedMLP, Linear, ParamOptions, format_of, param, weight_params
from jaxserve.parallel.mesh import partition_spec
from kernels_pallas.grouped_matmul.api import GroupedMatmul, Matrices
from kernels_pallas.quantized import QuantizedFormat, quantize_rows
from kernels_pallas.routing.api import RouterConfig, Routing
from kernels_pallas.shards import DATA, EXPERT, IN_EXPERT, MODEL, over_model
from kernels_pallas.stacked import LoraPair, Stacked
from kernels_pallas.token_tiles import Blocks, PermutedRows, sort_into_blocks

# (gate, up) -> input of the down projection.
Gated: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def router_config(config: MoeConfig) -> RouterConfig:
    """Return the settings of the routing."""
    return RouterConfig(
        top_k=config.top_k,
        scores=config.scores,
        normalize=config.normalize,
        scale=config.scale,
        num_groups=config.num_groups,
        top_groups=config.top_groups,
        group_scores=config.group_scores,
    )


class _ByAdapter(NamedTuple):
    """Block rows of tokens that have an adapter, sorted by adapter and expert.

    Attributes:
        matmul: the grouped matmul kernel.
        blocks: blocks whose group is `(slot - 1) * num_experts + expert`.
        source_Q: i32, index in P of each row of `blocks`.
        target_P: i32, index in Q of each row of the experts' blocks; out of range (Q) for rows without an adapter.
    """

    matmul: GroupedMatmul
    blocks: Blocks
    source_Q: jax.Array
    target_P: jax.Array

    def update(self, lora: LoraPair, x: jax.Array, row_P: jax.Array | None) -> jax.Array:
        """Return the adapters' updates of the rows' outputs, [P, O]; see `GroupedMatmul` for the rows."""
        _, num_slots, num_experts, *_ = lora.a.stack.shape
        first = lora.a.layer * (num_slots * num_experts)
        blocks = self.blocks._replace(group_C=self.blocks.group_C + first)
        a, b = (Matrices(each.stack.reshape(-1, *each.stack.shape[3:])) for each in lora)
        source_Q = self.source_Q if row_P is None else row_P.at[self.source_Q].get(mode="fill", fill_value=x.shape[0])
        x_QI = x.at[source_Q].get(mode="fill", fill_value=0)
        (r_QR,) = self.matmul(x_QI, [a], blocks)
        (y_QO,) = self.matmul(r_QR, [b], blocks, transposed=True)
        return y_QO.at[self.target_P].get(mode="fill", fill_value=0)


class _Rows(NamedTuple):
    """Rows in the experts' blocks, with the kernel that multiplies them.

    Attributes:
        matmul: the grouped matmul kernel.
        format: format of quantised weights; None for others.
        blocks: blocks whose groups are indices of matrices in the stack of all layers.
        row_P: i32, the token in each row of the blocks; None for rows in the order of the blocks.
        by_adapter: rows of tokens that have an adapter; None without adapters.
        quantized: whether rows are quantised before they are multiplied by the experts' matrices.
    """

    matmul: GroupedMatmul
    format: QuantizedFormat | None
    blocks: Blocks
    row_P: jax.Array | None
    by_adapter: _ByAdapter | None
    quantized: bool


class _ExpertWeights(NamedTuple):
    """Weights of one projection of all experts, as a step uses them, or their partition specs.

    Attributes:
        weight: [L, E, out, in], stacked over the layers that have experts.
        scale, zero: scales and zero points of the weight's blocks if it is quantised.
        bias: [E, out], or None.
        lora: LoRA matrices of all slots, [L, S, E, R, in] and [L, S, E, R, out], or None.
    """

    weight: Stacked
    scale: Any
    zero: Any
    bias: Any
    lora: LoraPair | None

    def matrices(self, format: QuantizedFormat | None) -> Matrices:
        """Return the matrices of all layers' experts."""
        scale, zero = (None if each is None else each.reshape(-1, *each.shape[2:]) for each in (self.scale, self.zero))
        return Matrices(self.weight.flat, scale, zero, format)

    def add_updates(self, y_PO: jax.Array, x: jax.Array, rows: _Rows) -> jax.Array:
        """Add the adapters' update and the bias to the products with the matrices."""
        if self.lora is not None and rows.by_adapter is not None:
            y_PO = y_PO + rows.by_adapter.update(self.lora, x, rows.row_P)
        if self.bias is None:
            return y_PO
        expert_C = rows.blocks.group_C - self.weight.first
        by_block_CWO = y_PO.reshape(expert_C.shape[0], -1, y_PO.shape[1])
        return (by_block_CWO + self.bias[expert_C][:, None]).reshape(y_PO.shape)


def _multiply(projections: Sequence[_ExpertWeights], x: jax.Array, rows: _Rows) -> list[jax.Array]:
    """Multiply each row by its expert's matrix of each projection; add the adapters' updates and the biases."""
    matrices = [each.matrices(rows.format) for each in projections]
    multiplied = quantize_rows(x, rows.format) if rows.quantized and rows.format is not None else x
    results = rows.matmul(multiplied, matrices, rows.blocks, row_P=rows.row_P, out_dtype=x.dtype)
    return [each.add_updates(y_PO, x, rows) for each, y_PO in zip(projections, results, strict=True)]


class ExpertLinear(nnx.Module):
    """One projection of all experts: weights [E, out, in] and optional biases [E, out]."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        axes: Axes,
        bias: bool,
        dtype: jnp.dtype,
        quantization: QuantizationConfig | None,
    ) -> None:
        # A step reads only the experts that have tokens; slicing the stack would copy all of them.
        self.weight, self.scale, self.zero = weight_params(
            shape, dtype, axes, quantization, ParamOptions(keep_stacked=True)
        )
        self.bias = param(shape[:2], dtype, axes[:2]) if bias else None
        self.path: Path = ()
        self._axes, self._shape = axes, shape

    def arrays(self, ctx: LayerContext) -> _ExpertWeights:
        """Return the weights of all experts and the LoRA matrices."""
        weight: Any = self.weight.get_value()  # a Stacked
        scale, zero = (None if each is None else each.get_value().stack for each in self._of_blocks())
        bias = None if self.bias is None else self.bias[...]
        return _ExpertWeights(weight, scale, zero, bias, ctx.lora.expert_pair(self.path))

    def specs(self, ctx: LayerContext) -> _ExpertWeights:
        """Return the partition specs of `arrays`."""
        mesh = ctx.ops.experts.mesh
        stack = _in_replica(partition_spec(("layers", *self._axes), (1, *self._shape), mesh))
        scale, zero = (None if each is None else self._block_specs(each, mesh) for each in self._of_blocks())
        bias = None if self.bias is None else P(*stack[1:3])
        lora = None if ctx.lora.expert_pair(self.path) is None else self._lora_specs(mesh)
        return _ExpertWeights(_specs_of_stack(stack), scale, zero, bias, lora)

    def _lora_specs(self, mesh: Mesh) -> LoraPair:
        """Return specs that split LoRA matrices like the weights (S-LoRA, arXiv:2311.03285)."""
        experts, outputs, inputs = _in_replica(partition_spec(self._axes, self._shape, mesh))
        return LoraPair(*(_specs_of_stack(P(None, None, experts, None, axis)) for axis in (inputs, outputs)))

    def _of_blocks(self) -> tuple[Any, Any]:
        return self.scale, self.zero

    def _block_specs(self, block_spec: Any, mesh: Mesh) -> P:
        axes: Axes = block_spec.get_metadata()["logical_axes"]
        return _in_replica(partition_spec(("layers", *axes), (1, *self._shape), mesh))


def _specs_of_stack(spec: P) -> Stacked:
    return Stacked(spec, P())  # pyright: ignore[reportArgumentType]  # specs instead of arrays


def _in_replica(spec: P) -> P:
    """Return the spec within a replica, where the data axis is already split."""
    return P(*(EXPERT if isinstance(axis, tuple) and EXPERT in axis else axis for axis in spec))


class Experts(nnx.Module):
    """The MLPs of the routed experts."""

    def __init__(self, args: DecoderArgs, experts: MoeConfig) -> None:
        config, dtype = args.config, args.dtype
        number, inner, outer = experts.num_experts, experts.intermediate_size, config.hidden_size
        make = partial(ExpertLinear, bias=experts.bias, dtype=dtype, quantization=config.quantized("experts"))
        quantization = config.quantized("experts")
        self._format = None if quantization is None else format_of(quantization)
        axis = "experts_shared" if args.parallelism.shared_experts else "experts"
        self.gate_proj = make((number, inner, outer), axes=(axis, "expert_mlp", "hidden"))
        self.up_proj = make((number, inner, outer), axes=(axis, "expert_mlp", "hidden"))
        self.down_proj = make((number, outer, inner), axes=(axis, "hidden", "expert_mlp"))
        self._gated = _gated(config, experts)
        self._num_experts = number
        self._shared = args.parallelism.shared_experts

    def __call__(self, x_TD: jax.Array, routing: Routing, ctx: LayerContext) -> jax.Array:
        """Return the weighted sum of each token's experts, [T, D] in x's dtype."""
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        slot_T = None if ctx.lora.experts is None else ctx.lora.experts.slot_T
        if self._shared:
            # Each replica runs its share of the experts on the tokens of all replicas.
            gather = partial(lax.all_gather, axis_name=DATA, tiled=True)
            x_TD, routing, slot_T = jax.tree.map(gather, (x_TD, routing, slot_T))
        in_specs = (P(), P(), P(), *(layer.specs(ctx) for layer in layers))
        run = over_model(partial(self._run_local, ctx), ctx.ops.experts.mesh, in_specs, P())
        y_TD = run(x_TD, routing, slot_T, *(layer.arrays(ctx) for layer in layers))
        return lax.psum_scatter(y_TD, DATA, tiled=True) if self._shared else y_TD

    def _run_local(
        self,
        ctx: LayerContext,
        x_TD: jax.Array,
        routing: Routing,
        slot_T: jax.Array | None,
        gate: _ExpertWeights,
        up: _ExpertWeights,
        down: _ExpertWeights,
    ) -> jax.Array:
        """Run the experts of one device and sum the outputs over the devices of a replica."""
        matmul = ctx.ops.experts.matmul
        num_tokens, top_k = routing.id_TU.shape
        num_experts = gate.weight.stack.shape[1]
        own_TU = routing.id_TU - lax.axis_index((DATA, EXPERT) if self._shared else EXPERT) * num_experts
        own_TU = jnp.where((own_TU >= 0) & (own_TU < num_experts), own_TU, num_experts)
        # The block size is chosen for all experts: on average, local experts get their share of the tokens.
        row_bytes = max(x_TD.shape[1], gate.weight.stack.shape[2]) * x_TD.dtype.itemsize
        block_rows = matmul.block_rows(num_tokens * top_k, self._num_experts, row_bytes)
        blocks, permuted = sort_into_blocks(
            own_TU.reshape(-1), num_experts, block_rows, first_group=gate.weight.first, max_compared=matmul.max_compared
        )
        by_adapter = None
        if slot_T is not None and ctx.lora.experts is not None:
            adapters = ctx.lora.experts._replace(slot_T=slot_T)
            by_adapter = self._sort_by_adapter(adapters, own_TU, num_experts, permuted, row_bytes)
        token_P, quantized = permuted.row_P // top_k, ctx.ops.experts.quantizes(num_tokens)
        rows = _Rows(matmul, self._format, blocks, token_P, by_adapter, quantized)
        gate_PF, up_PF = _multiply((gate, up), x_TD, rows)
        h_PF = self._gated(gate_PF, up_PF)
        if down.bias is not None:
            # Only one of the devices that share an expert adds its bias.
            down = down._replace(bias=jnp.where(lax.axis_index(IN_EXPERT) == 0, down.bias, jnp.zeros_like(down.bias)))
        (y_PD,) = _multiply((down,), h_PF, rows._replace(row_P=None))
        # The index is out of range, which reads zeros, where the expert is on another device.
        y_TUD = y_PD.at[permuted.block_row_R.reshape(num_tokens, top_k)].get(mode="fill", fill_value=0)
        y_TD = jnp.einsum("tud,tu->td", y_TUD.astype(jnp.float32), routing.weight_TU)
        return lax.psum(y_TD.astype(x_TD.dtype), MODEL)

    def _sort_by_adapter(
        self, adapters: ExpertAdapters, own_TU: jax.Array, num_experts: int, permuted: PermutedRows, row_bytes: int
    ) -> _ByAdapter:
        """Sort the tokens again, by adapter and expert.

        If the experts' blocks were split by adapter instead, an expert's matrix would be read once for each adapter.

        Args:
            adapters: adapters of the tokens.
            own_TU: i32, indices of each token's experts on this device; `num_experts` for other experts.
            num_experts: experts on this device.
            permuted: positions of the tokens in the experts' blocks.
            row_bytes: bytes per row.
        """
        matmul, num_slots, slot_T = adapters
        adapted_TU = (slot_T[:, None] > 0) & (own_TU < num_experts)
        group_TU = jnp.where(adapted_TU, (slot_T[:, None] - 1) * num_experts + own_TU, num_slots * num_experts)
        block_rows = matmul.block_rows(group_TU.size, num_slots * self._num_experts, row_bytes)
        blocks, own_permuted = sort_into_blocks(
            group_TU.reshape(-1), num_slots * num_experts, block_rows, max_compared=matmul.max_compared
        )
        return _ByAdapter(
            matmul, blocks, permuted.block_row_R[own_permuted.row_P], own_permuted.block_row_R[permuted.row_P]
        )


def _gated(config: ModelConfig, experts: MoeConfig) -> Gated:
    """Return the function that combines gate and up."""
    activation, limit = ACTIVATIONS[config.activation], experts.swiglu_limit
    if limit is None:
        return lambda gate, up: activation(gate) * up

    def clamped(gate: jax.Array, up: jax.Array) -> jax.Array:
        """gpt-oss's SwiGLU: the gate through GELU's sigmoid form (arXiv:1606.08415), times `up + 1`."""
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(experts.swiglu_alpha * gate) * (up + 1)

    return clamped


class Gate(Linear):
    """A projection to scores, which stay in f32."""

    out_dtype = jnp.float32


class MoE(nnx.Module):
    """Router and routed experts, and a shared expert if the model has one."""

    def __init__(self, args: DecoderArgs) -> None:
        config, dtype = args.config, args.dtype
        experts, size = config.moe, config.hidden_size
        assert experts is not None
        make_gate = partial(Gate, size, dtype=dtype)
        self.router = make_gate(experts.num_experts, axes=(None, "hidden"), bias=experts.bias)
        self.experts = Experts(args, experts)
        if (shared := experts.shared_intermediate_size) is not None:
            self.shared_expert = GatedMLP(
                size,
                shared,
                bias=False,
                dtype=dtype,
                activation=config.activation,
                quantization=config.quantized("shared_expert"),
            )
        if experts.shared_gate:
            self.shared_expert_gate = make_gate(1, axes=(None, "hidden"), bias=False)
        stacked, f32 = ParamOptions(keep_stacked=True), jnp.dtype(jnp.float32)
        self.correction = param((experts.num_experts,), f32, (None,), stacked) if experts.correction else None
        self._config = experts

    def __call__(self, x_TD: jax.Array, ctx: LayerContext) -> jax.Array:
        """[T, D] -> [T, D]."""
        correction = None if self.correction is None else cast("Stacked", self.correction.get_value())
        routing = ctx.ops.experts.route(self.router(x_TD, ctx), correction)
        # Padding tokens are all alike: without this, every step would read the experts that they choose.
        id_TU = jnp.where(ctx.live_T[:, None], routing.id_TU, self._config.num_experts)
        y_TD = self.experts(x_TD, routing._replace(id_TU=id_TU), ctx)
        if self._config.shared_intermediate_size is None:
            return y_TD
        shared_TD = self.shared_expert(x_TD, ctx)
        if self._config.shared_gate:
            shared_TD = jax.nn.sigmoid(self.shared_expert_gate(x_TD, ctx)).astype(x_TD.dtype) * shared_TD
        return y_TD + shared_TD
