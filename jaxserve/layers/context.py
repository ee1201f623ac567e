"""The context of a layer during tracing: implementations of its ops, and the adapters of its tokens.

The decoder builds a context once per layer and passes it down as an argument. Nothing is stored on a module.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import jax
from jax.sharding import Mesh

from kernels_pallas.dispatch import Sampler
from kernels_pallas.grouped_matmul.api import GroupedMatmul, HeadMatmul
from kernels_pallas.grouped_matmul.xla.heads import multiply_heads
from kernels_pallas.lora_matmul.api import LoraMatmul
from kernels_pallas.paged_attention.api import AttentionBackend
from kernels_pallas.rms_norm.api import RmsNorm
from kernels_pallas.rms_norm.xla.backend import rms_norm
from kernels_pallas.rope.api import Rope
from kernels_pallas.rope.xla.backend import rope
from kernels_pallas.routing.api import Router, Routing
from kernels_pallas.stacked import LoraPair, Stacked

if TYPE_CHECKING:
    from jaxserve.layers.linear import Embedding

Path: TypeAlias = tuple[str, ...]
# How activations are multiplied by 8-bit weights in steps that are bound by arithmetic: as they are, or quantised, by a
# kernel or by XLA.
Activations: TypeAlias = Literal["exact", "kernel", "xla"]

# Steps of more tokens are bound by arithmetic, in which 8-bit products have twice the rate. Smaller ones are bound by
# the bytes of the weights, and stay exact.
MAX_EXACT_TOKENS = 128


class Backends(NamedTuple):
    """The implementation of each op, chosen once for a model on a mesh.

    Attributes:
        attention: paged attention; it defines the shapes of the cache.
        sampler: samples tokens from logits.
        linear: linear modules, as a grouped matmul with one group.
        experts: projections of experts.
        router: chooses the experts of tokens; None without experts.
        lora: LoRA of linear modules.
        lora_experts: LoRA of experts.
        norm: RMSNorm.
        rope: rotary position embedding.
        head_matmul: products of heads with their own matrices, in MLA.
        linear_activations, expert_activations: how activations are multiplied by 8-bit weights.
    """

    attention: AttentionBackend
    sampler: Sampler
    linear: GroupedMatmul
    experts: GroupedMatmul
    router: Router | None
    lora: LoraMatmul
    lora_experts: GroupedMatmul
    norm: RmsNorm
    rope: Rope
    head_matmul: HeadMatmul
    linear_activations: Activations = "exact"
    expert_activations: Activations = "exact"


class LinearOps(NamedTuple):
    """Ops of linear modules.

    Attributes:
        matmul: the kernel, run on each device.
        mesh: the mesh over which the weights are sharded.
        modules: paths of the modules that the kernel supports. XLA multiplies by the others, and dequantises them
            first if they are quantised.
        activations: how activations are multiplied by 8-bit weights in large steps.
    """

    matmul: GroupedMatmul
    mesh: Mesh
    modules: Collection[Path]
    activations: Activations = "exact"

    def uses_stack(self, module: Path, *, quantized: bool, num_tokens: int) -> bool:
        """Return whether a module's weight is multiplied where it is in its stack: by the kernel, or by 8 bits."""
        if quantized and self.quantizes(num_tokens) == "xla":
            return True
        return module in self.modules and (quantized or num_tokens <= self.matmul.max_dense_rows)

    def quantizes(self, num_tokens: int) -> Activations:
        """Return how the activations of a step are multiplied by 8-bit weights."""
        return self.activations if num_tokens > MAX_EXACT_TOKENS else "exact"


class ExpertOps(NamedTuple):
    """Ops of experts.

    Attributes:
        matmul: the kernel, run on each device.
        mesh: the mesh over which the experts are sharded.
        router: chooses the experts of tokens; None without experts.
        activations: how activations are multiplied by 8-bit weights in large steps.
    """

    matmul: GroupedMatmul
    mesh: Mesh
    router: Router | None = None
    activations: Activations = "exact"

    def quantizes(self, num_tokens: int) -> bool:
        """Return whether the activations of a step are quantised."""
        return self.activations == "kernel" and num_tokens > MAX_EXACT_TOKENS

    def route(self, logits_TE: jax.Array, correction: Stacked | None) -> Routing:
        """See `Router`."""
        assert self.router is not None
        return self.router(logits_TE, correction)


class LayerOps(NamedTuple):
    """The ops of layers, apart from attention and LoRA.

    Attributes:
        linear: ops of linear modules.
        experts: ops of experts.
        norm: RMSNorm of activations that every device has entirely.
        rope: rotary position embedding.
        head_matmul: products of heads with their own matrices.
    """

    linear: LinearOps
    experts: ExpertOps
    norm: RmsNorm = rms_norm
    rope: Rope = rope
    head_matmul: HeadMatmul = multiply_heads


class ExpertAdapters(NamedTuple):
    """Adapters of tokens that are routed to experts.

    Attributes:
        matmul: the kernel for LoRA matrices of experts, run on each device.
        num_slots: number of slots except slot 0, which has no adapter.
        slot_T: i32, slot of each token; 0 for none.
    """

    matmul: GroupedMatmul
    num_slots: int
    slot_T: jax.Array


class LoraGroup(Protocol):
    """LoRA updates of linear modules that read the same activations and share the product with the A matrices."""

    def update(self, module: Path, x_TI: jax.Array) -> jax.Array | None:
        """Return the adapters' update of a module's result, [T, O], or None if no adapter changes it."""
        ...


class HeadUpdates(Protocol):
    """LoRA updates of MLA's `kv_b_proj` in its absorbed form."""

    def absorb(self, q_TNH: jax.Array, /) -> jax.Array:
        """Return the update of the absorbed queries, [T, N, C]."""
        ...

    def project_v(self, o_TNC: jax.Array, /) -> jax.Array:
        """Return the update of the values, [T, N, V], from the attention's result."""
        ...


class LoraLayer(Protocol):
    """The adapters of one layer's tokens."""

    def group(self, modules: Sequence[Path]) -> LoraGroup | None:
        """Return the updates of modules with the same inputs, or None if no adapter changes any of them."""
        ...

    def heads(self, module: Path, key_dim: int, num_heads: int) -> HeadUpdates | None:
        """Return the updates of MLA's `kv_b_proj` in its absorbed form, or None if no adapter changes it.

        Args:
            module: path of the module.
            key_dim: number of outputs per head that form its key; the others form its value.
            num_heads: number of heads over all devices.
        """
        ...

    def expert_pair(self, module: Path) -> LoraPair | None:
        """Return the LoRA matrices of one projection of all experts, or None if no adapter changes it."""
        ...

    @property
    def experts(self) -> ExpertAdapters | None:
        """The tokens' adapters as experts need them; None without adapters."""
        ...


class StepLora(Protocol):
    """The adapters of a step."""

    def slots_of(self, num_tokens: int) -> jax.Array:
        """Return the slot of each token, i32[T]; 0 for none."""
        ...

    def plan(self, slot_T: jax.Array) -> Any:
        """Return metadata of the tokens' slots, which all layers share."""
        ...

    def embed(self, embedding: "Embedding", token_ids_T: jax.Array) -> jax.Array:
        """Look up token embeddings, including the adapters' updates."""
        ...

    @property
    def layers(self) -> dict[str, Any]:
        """The stacked LoRA matrices of the layers, as a tree of the layers' modules."""
        ...

    def layer(self, matrices: dict[str, Any], plan: Any) -> LoraLayer:
        """Return the adapters of one layer.

        Args:
            matrices: the layer's part of `layers`, with `Stacked` leaves.
            plan: result of `plan` for the tokens that the layer processes.
        """
        ...

    def add_to_logits(self, logits_BV: jax.Array, x_BD: jax.Array, plan: Any) -> jax.Array:
        """Return logits, f32[B, V], with the updates of the output head added."""
        ...


class NoLora:
    """A `StepLora` and `LoraLayer` without adapters."""

    layers: dict[str, Any]
    experts = None

    def __init__(self) -> None:
        self.layers = {}

    def slots_of(self, num_tokens: int) -> jax.Array:
        """See `StepLora`."""
        return jax.numpy.zeros(num_tokens, jax.numpy.int32)

    def plan(self, slot_T: jax.Array) -> None:
        """See `StepLora`."""

    def embed(self, embedding: "Embedding", token_ids_T: jax.Array) -> jax.Array:
        """See `StepLora`."""
        return embedding(token_ids_T)

    def layer(self, matrices: dict[str, Any], plan: Any) -> "NoLora":
        """See `StepLora`."""
        return self

    def add_to_logits(self, logits_BV: jax.Array, x_BD: jax.Array, plan: Any) -> jax.Array:
        """See `StepLora`."""
        return logits_BV

    def group(self, modules: Sequence[Path]) -> None:
        """See `LoraLayer`."""

    def heads(self, module: Path, key_dim: int, num_heads: int) -> None:
        """See `LoraLayer`."""

    def expert_pair(self, module: Path) -> None:
        """See `LoraLayer`."""


class LayerContext(NamedTuple):
    """Everything that a layer needs during tracing.

    Attributes:
        ops: the ops.
        lora: adapters of the layer's tokens.
        live_T: bool, whether a token is part of the step and not padding.
        mla: form of MLA: attention over the cached latent, with W_UK folded into the queries and W_UV into the results
            (`absorbed`), or over keys and values of each head (`mha`).
    """

    ops: LayerOps
    lora: LoraLayer
    live_T: jax.Array
    mla: Literal["absorbed", "mha"] = "absorbed"
