"""The kernels of a platform that is not present, interpreted on CPU devices: for tests and `jaxserve.device_check`.

Interpreters find what a compiler does not: reads out of bounds or of memory that was never written, and races between
threads, copies and barriers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from jax.sharding import Mesh

from kernels_pallas.dispatch import Sampler, gpu_attention_tiles, tpu_attention_tiles
from kernels_pallas.grouped_matmul.api import ExpertShape, GroupedMatmul, HeadMatmul
from kernels_pallas.lora_matmul.api import LoraMatmul, LoraModule
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionConfig
from kernels_pallas.pallas import TpuChip, plgpu, pltpu
from kernels_pallas.quantized import EIGHT_BIT
from kernels_pallas.rms_norm.api import RmsNorm
from kernels_pallas.rope.api import Rope
from kernels_pallas.routing.api import Router, RouterConfig
from kernels_pallas.tuning import NO_TUNING, TuningTable, fields_of, pick

T = TypeVar("T")

# On-chip memory of a small TPU.
_TPU_CHIP = TpuChip(64 << 20, 1 << 20)


@dataclass(frozen=True)
class InterpretedKernels:
    """Implementations of all ops.

    Attributes:
        platform: whose kernels.
        mesh: CPU devices; the GPU interpreter supports only one.
        detect_races: whether to record every access, which makes the interpreters several times slower.
        num_cores: SMs of the GPU for which tiles are chosen.
        tpu_cores: TensorCores of a TPU.
    """

    platform: Literal["tpu", "gpu"]
    mesh: Mesh
    detect_races: bool = True
    num_cores: int = 2
    tpu_cores: int = 1

    @property
    def _params(self) -> Any:
        if self.platform == "gpu":
            return plgpu.InterpretGPUParams(detect_races=self.detect_races)
        return pltpu.InterpretParams(
            detect_races=self.detect_races,
            out_of_bounds_reads="raise",
            uninitialized_memory="nan",
            num_cores_or_threads=self.tpu_cores,
        )

    def attention(self, config: AttentionConfig, tuning: TuningTable = NO_TUNING) -> AttentionBackend:
        """Return paged attention; on GPU with tiles that the interpreter supports."""
        chosen = [pick(tiles, tuning.tiles.get(key)) for key, tiles in self._attention_tiles(config).items()]
        if self.platform == "tpu":
            from kernels_pallas.paged_attention.tpu.backend import TpuAttention  # noqa: PLC0415

            chip = _TPU_CHIP._replace(num_cores=self.tpu_cores)
            return TpuAttention(config, self.mesh, chip, tiles=chosen[0], interpret=self._params)
        from kernels_pallas.paged_attention.gpu.backend import GpuAttention  # noqa: PLC0415

        decode, prefill = (replace(tile, interpretable=True) for tile in chosen)
        return GpuAttention(
            config, self.mesh, num_cores=self.num_cores, tiles=(decode, prefill), interpret=self._params
        )

    def attention_tiles(self, config: AttentionConfig) -> dict[str, list[dict[str, int | bool]]]:
        """Return the legal tiles of the attention kernels; see `dispatch.attention_tiles`."""
        tiles = self._attention_tiles(config)
        return {key: [fields_of(tile) for tile in legal] for key, legal in tiles.items()}

    def _attention_tiles(self, config: AttentionConfig) -> dict[str, list[Any]]:
        if self.platform == "tpu":
            return tpu_attention_tiles(config, self.mesh, _TPU_CHIP.vmem_bytes)
        return gpu_attention_tiles(config, self.mesh)

    def sampler(self, block: int = 4096) -> Sampler:
        """Return a sampler; on TPU it processes `block` ids at a time."""
        if self.platform == "tpu":
            from kernels_pallas.sampling.tpu import backend as tpu  # noqa: PLC0415

            return partial(tpu.sample, block=block, interpret=self._params)
        from kernels_pallas.sampling.gpu import backend as gpu  # noqa: PLC0415

        return partial(gpu.sample, interpret=self._params)

    def grouped_matmul(self, shape: ExpertShape | None = None) -> GroupedMatmul:
        """Return the grouped matmul for matrices of a shape; by default, the one for 64 or more outputs."""
        if self.platform == "tpu":
            from kernels_pallas.grouped_matmul.tpu import backend as tpu  # noqa: PLC0415

            return tpu.TpuGroupedMatmul(self.tpu_cores, EIGHT_BIT, self._params)
        from kernels_pallas.grouped_matmul.gpu import backend, narrow  # noqa: PLC0415

        if shape is not None and narrow.is_narrow(shape):
            narrow.check_shape(shape)
            return narrow.GpuNarrowMatmul(self._params)
        if shape is not None:
            backend.check_shape(shape)
        return backend.GpuGroupedMatmul(self.num_cores, self._params)

    def lora(self, module: LoraModule | None = None) -> LoraMatmul:
        """Return LoRA matmuls; a module is only checked."""
        if self.platform == "tpu":
            from kernels_pallas.lora_matmul.tpu import backend as tpu  # noqa: PLC0415

            if module is not None:
                tpu.check_inputs(module.num_inputs)
            return tpu.make_lora_matmul(self.mesh, self._params)
        from kernels_pallas.lora_matmul.gpu import backend as gpu  # noqa: PLC0415

        if module is not None:
            gpu.check_module(module)
        return gpu.make_lora_matmul(self.mesh, self.num_cores, self._params)

    def router(self, config: RouterConfig, num_experts: int) -> Router:
        """Return a router."""
        from kernels_pallas.routing.gpu.backend import GpuRouter, num_parts  # noqa: PLC0415

        num_parts(config, num_experts)
        return self._on_gpu(lambda: GpuRouter(config, self.mesh, self._params))

    def norm(self) -> RmsNorm:
        """Return RMSNorm."""
        from kernels_pallas.rms_norm.gpu.backend import GpuRmsNorm  # noqa: PLC0415

        return self._on_gpu(lambda: GpuRmsNorm(self.mesh, self._params))

    def rope(self) -> Rope:
        """Return rotary position embeddings."""
        from kernels_pallas.rope.gpu.backend import GpuRope  # noqa: PLC0415

        return self._on_gpu(lambda: GpuRope(self.mesh, self._params))

    def head_matmul(self) -> HeadMatmul:
        """Return the products of heads with their own matrices."""
        from kernels_pallas.grouped_matmul.gpu.heads import GpuHeadMatmul  # noqa: PLC0415

        return self._on_gpu(lambda: GpuHeadMatmul(self.mesh, self.num_cores, self._params))

    def _on_gpu(self, make: Callable[[], T]) -> T:
        if self.platform != "gpu":
            raise NotImplementedError(f"portable XLA does this on {self.platform}")
        return make()
