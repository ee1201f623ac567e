"""What a layer is given while it is traced: implementations of its ops, and the adapters of its tokens.

A context is built once per layer by the decoder and passed down as an argument. Nothing is stored on a module.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import jax
from jax.sharding import Mesh

from kernels_pallas.dispatch import Sampler
from kernels_pallas.grouped_matmul.api import GroupedMatmul
from kernels_pallas.lora_matmul.api import LoraMatmul
from kernels_pallas.paged_attention.api import AttentionBackend
from kernels_pallas.stacked import LoraPair

if TYPE_CHECKING:
    from jaxserve.layers.linear import Embedding

Path: TypeAlias = tuple[str, ...]


class Backends(NamedTuple):
    """The implementation of each op, chosen once for a model on a mesh.

    Attributes:
        attention: paged attention; it shapes the cache.
        sampler: samples tokens from logits.
        linear: quantised linear maps, as a grouped matmul of one group.
        experts: linear maps of experts.
        lora: LoRA of linear modules.
        lora_experts: LoRA of experts.
    """

    attention: AttentionBackend
    sampler: Sampler
    linear: GroupedMatmul
    experts: GroupedMatmul
    lora: LoraMatmul
    lora_experts: GroupedMatmul


class LinearOps(NamedTuple):
    """How quantised linear maps are multiplied.

    Attributes:
        matmul: the kernel on one device.
        mesh: the mesh that the weights lie on.
        modules: paths of the modules that use the kernel; XLA dequantises the others.
    """

    matmul: GroupedMatmul
    mesh: Mesh
    modules: Collection[Path]


class ExpertOps(NamedTuple):
    """How experts are multiplied.

    Attributes:
        matmul: the kernel on one device.
        mesh: the mesh that the experts lie on.
    """

    matmul: GroupedMatmul
    mesh: Mesh


class ExpertAdapters(NamedTuple):
    """The adapters of tokens that go through experts.

    Attributes:
        matmul: the kernel for their LoRA matrices, on one device.
        num_slots: slots without slot 0, which has no adapter.
        slot_T: i32, the slot of each token; 0 for none.
    """

    matmul: GroupedMatmul
    num_slots: int
    slot_T: jax.Array


class LoraGroup(Protocol):
    """The updates of linear modules that read the same activations and share their first product."""

    def update(self, module: Path, x_TI: jax.Array) -> jax.Array | None:
        """What the tokens' adapters add to a module's result, [T, O]; None where no adapter changes it."""
        ...


class HeadUpdates(Protocol):
    """The updates of MLA's `kv_b_proj` in its absorbed form."""

    def absorb(self, q_TNH: jax.Array, /) -> jax.Array:
        """What to add to the absorbed queries, [T, N, C]."""
        ...

    def project_v(self, o_TNC: jax.Array, /) -> jax.Array:
        """What to add to the values, [T, N, V], of the attention's result."""
        ...


class LoraLayer(Protocol):
    """The adapters of one layer's tokens."""

    def group(self, modules: Sequence[Path]) -> LoraGroup | None:
        """The updates of modules with the same inputs; None where no adapter changes any of them."""
        ...

    def heads(self, module: Path, key_dim: int, num_heads: int) -> HeadUpdates | None:
        """The updates of MLA's `kv_b_proj`, in its absorbed form.

        Args:
            module: its path.
            key_dim: outputs of a head that make its key; the others make its value.
            num_heads: heads on all devices.
        """
        ...

    def expert_pair(self, module: Path) -> LoraPair | None:
        """The LoRA matrices of a linear map of every expert."""
        ...

    @property
    def experts(self) -> ExpertAdapters | None:
        """What experts need to know of the tokens' adapters."""
        ...


class StepLora(Protocol):
    """The adapters of a step."""

    def slots_of(self, num_tokens: int) -> jax.Array:
        """i32[T], the slot of each token; 0 for none."""
        ...

    def plan(self, slot_T: jax.Array) -> Any:
        """What all layers need to know of the slots of these tokens."""
        ...

    def embed(self, embedding: "Embedding", token_ids_T: jax.Array) -> jax.Array:
        """Rows of the embedding, updates included."""
        ...

    @property
    def layers(self) -> dict[str, Any]:
        """The LoRA matrices of layers, stacked, as a tree of the layers' modules."""
        ...

    def layer(self, matrices: dict[str, Any], plan: Any) -> LoraLayer:
        """The adapters of one layer.

        Args:
            matrices: that layer's part of `layers`, its leaves `Stacked`.
            plan: from `plan`, of the tokens that the layer is given.
        """
        ...

    def add_to_logits(self, logits_BV: jax.Array, x_BD: jax.Array, plan: Any) -> jax.Array:
        """Logits, f32[B, V], with the updates of the output head."""
        ...


class NoLora:
    """A step, and a layer, without adapters."""

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
    """What a layer needs while it is traced.

    Attributes:
        linear: how quantised linear maps are multiplied.
        experts: how experts are multiplied.
        lora: the adapters of the layer's tokens.
        mla: the form of MLA: over the cached latent, with W_UK folded into the queries and W_UV into the results
            (`absorbed`), or over keys and values of each head (`mha`).
    """

    linear: LinearOps
    experts: ExpertOps
    lora: LoraLayer
    mla: Literal["absorbed", "mha"] = "absorbed"
