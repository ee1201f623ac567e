"""The kernels to check: those that the server chooses on the devices at hand."""

from dataclasses import dataclass
from typing import Protocol, TypeVar

from jax.sharding import Mesh

from kernels_pallas.dispatch import (
    Choice,
    Sampler,
    attention_tiles,
    choose_attention,
    choose_grouped_matmul,
    choose_head_matmul,
    choose_lora,
    choose_norm,
    choose_rope,
    choose_router,
    choose_sampler,
)
from kernels_pallas.grouped_matmul.api import ExpertShape, GroupedMatmul, HeadMatmul
from kernels_pallas.lora_matmul.api import LoraMatmul, LoraModule
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionConfig
from kernels_pallas.rms_norm.api import RmsNorm
from kernels_pallas.rope.api import Rope
from kernels_pallas.routing.api import Router, RouterConfig
from kernels_pallas.tuning import NO_TUNING, TuningTable

T = TypeVar("T")


class Kernels(Protocol):
    """Implementations of all ops; methods raise NotImplementedError where a platform has no kernel."""

    def attention(self, config: AttentionConfig, tuning: TuningTable = NO_TUNING) -> AttentionBackend: ...  # noqa: D102
    def attention_tiles(self, config: AttentionConfig) -> dict[str, list[dict[str, int | bool]]]: ...  # noqa: D102
    def sampler(self) -> Sampler: ...  # noqa: D102
    def grouped_matmul(self, shape: ExpertShape) -> GroupedMatmul: ...  # noqa: D102
    def lora(self, module: LoraModule) -> LoraMatmul: ...  # noqa: D102
    def router(self, config: RouterConfig, num_experts: int) -> Router: ...  # noqa: D102
    def norm(self) -> RmsNorm: ...  # noqa: D102
    def rope(self) -> Rope: ...  # noqa: D102
    def head_matmul(self) -> HeadMatmul: ...  # noqa: D102


@dataclass(frozen=True)
class NativeKernels:
    """The kernels of the devices at hand, on one of them."""

    mesh: Mesh

    def attention(self, config: AttentionConfig, tuning: TuningTable = NO_TUNING) -> AttentionBackend:
        """Return paged attention."""
        return _native(choose_attention("auto", config, self.mesh, tuning))

    def attention_tiles(self, config: AttentionConfig) -> dict[str, list[dict[str, int | bool]]]:
        """Return the legal tiles of the attention kernels."""
        return attention_tiles(config, self.mesh)

    def sampler(self) -> Sampler:
        """Return the sampler."""
        return _native(choose_sampler(self.mesh))

    def grouped_matmul(self, shape: ExpertShape) -> GroupedMatmul:
        """Return the grouped matmul for matrices of a shape."""
        return _native(choose_grouped_matmul([shape], self.mesh))

    def lora(self, module: LoraModule) -> LoraMatmul:
        """Return LoRA matmuls for a module."""
        return _native(choose_lora([module], self.mesh))

    def router(self, config: RouterConfig, num_experts: int) -> Router:
        """Return the router."""
        return _native(choose_router(config, num_experts, self.mesh))

    def norm(self) -> RmsNorm:
        """Return RMSNorm."""
        return _native(choose_norm(self.mesh))

    def rope(self) -> Rope:
        """Return rotary position embeddings."""
        return _native(choose_rope(self.mesh))

    def head_matmul(self) -> HeadMatmul:
        """Return the products of heads with their own matrices."""
        return _native(choose_head_matmul(self.mesh))


def _native(choice: Choice[T]) -> T:
    """Return the implementation; raise NotImplementedError if it is portable XLA in place of a kernel."""
    if choice.is_fallback:
        raise NotImplementedError(choice.reason)
    return choice.impl
