"""Settings of the engine and its components.

A component receives only its own config (such as `SchedulerConfig`), never the whole.
"""

from typing import Literal

import msgspec

from jaxserve.config.base import Config
from jaxserve.config.model import Dtype
from jaxserve.errors import LaunchError

KvCacheDtype = Literal["auto", "bf16", "bfloat16", "fp8_e4m3", "int8"]
SchedulePolicy = Literal["fcfs", "lpm", "priority"]
LoraEvictionPolicy = Literal["lru", "fifo"]

_MAX_ADAPTER_NAME = 256


class CacheConfig(Config, frozen=True):
    """Settings of the paged KV cache.

    Attributes:
        page_size: tokens per page.
        num_pages: pages in the pool.
        prefix_caching: keep the pages of finished requests for prompts with the same prefix.
    """

    page_size: int
    num_pages: int
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        _check_page_size(self.page_size)
        if self.num_pages < 1:
            raise LaunchError(f"the key/value pool is too small for a single page of {self.page_size} tokens")


class SchedulerConfig(Config, frozen=True):
    """Limits of a step, and the order of the waiting queue.

    Attributes:
        max_rows: maximum number of sequences that run at the same time.
        max_step_tokens: maximum number of tokens in one step; longer prompts are split into chunks.
        context_length: maximum number of prompt and output tokens together.
        policy: order of the waiting queue.
    """

    max_rows: int
    max_step_tokens: int
    context_length: int
    policy: SchedulePolicy = "fcfs"

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise LaunchError(f"--max-running-requests must be at least 1, got {self.max_rows}")
        if self.max_step_tokens < self.max_rows:
            raise LaunchError(
                f"--chunked-prefill-size ({self.max_step_tokens}) must be at least "
                f"--max-running-requests ({self.max_rows})"
            )


def adapter_name_problem(name: str) -> str | None:
    """Return why `name` is not a valid adapter name, or None if it is valid."""
    if name and len(name) <= _MAX_ADAPTER_NAME and name == name.strip() and ":" not in name and name.isprintable():
        return None
    return (
        f"an adapter's name must be 1 to {_MAX_ADAPTER_NAME} printable characters without a colon or spaces around "
        f"them, got {name[:_MAX_ADAPTER_NAME]!r}"
    )


class LoraConfig(Config, frozen=True):
    """LoRA adapters that requests can select.

    Attributes:
        paths: folders by adapter name.
        pinned: names of adapters that are never evicted from host memory or their slot.
        max_loras_per_batch: slots on the device, including the base model's.
        max_loaded: maximum number of adapters in host memory; None for no limit.
        max_rank: rank of a slot; None for the largest rank in `paths`.
        target_modules: PEFT names of modules that adapters may change; None for those that `paths` change.
        eviction_policy: which idle adapter is evicted from its slot.
    """

    paths: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    pinned: tuple[str, ...] = ()
    max_loras_per_batch: int = 8
    max_loaded: int | None = None
    max_rank: int | None = None
    target_modules: tuple[str, ...] | None = None
    eviction_policy: LoraEvictionPolicy = "lru"

    def __post_init__(self) -> None:
        for problem in filter(None, map(adapter_name_problem, self.paths)):
            raise LaunchError(f"--lora-paths: {problem}")
        if self.max_loras_per_batch < 2:
            raise LaunchError(
                "--max-loras-per-batch must be at least 2, the base model and an adapter, got "
                f"{self.max_loras_per_batch}"
            )
        if self.max_rank is not None and self.max_rank < 1:
            raise LaunchError(f"--max-lora-rank must be at least 1, got {self.max_rank}")
        if self.max_loaded is not None:
            for flag, value in (("--max-loras-per-batch", self.max_loras_per_batch), ("--lora-paths", len(self.paths))):
                if self.max_loaded < value:
                    raise LaunchError(f"--max-loaded-loras must be at least {value} ({flag}), got {self.max_loaded}")
        if not self.paths and (self.max_rank is None or self.target_modules is None):
            raise LaunchError("--enable-lora without --lora-paths needs --max-lora-rank and --lora-target-modules")
        if not self.fits_slots(num_pinned=len(self.pinned), num_others=len(self.paths) - len(self.pinned)):
            raise LaunchError(
                f"--lora-paths: {len(self.pinned)} of {len(self.paths)} adapters are pinned, which leaves no slot of "
                f"--max-loras-per-batch {self.max_loras_per_batch} to the others"
            )

    def fits_slots(self, *, num_pinned: int, num_others: int) -> bool:
        """Return whether the base model and the pinned adapters leave a slot for the other adapters, if any."""
        return num_pinned + min(num_others, 1) < self.max_loras_per_batch


class EngineConfig(Config, frozen=True):
    """Settings of the engine process.

    `None` means that the engine decides once it knows the device.

    Attributes:
        tp_size: devices per replica.
        dp_size: number of replicas.
        ep_size: number of groups of a replica's devices, each with its own experts.
        dp_attention: replicas share one set of experts, which is split over the groups of all replicas.
    """

    model_path: str
    revision: str | None = None
    download_dir: str | None = None
    dtype: Dtype = "auto"
    context_length: int | None = None
    tp_size: int = 1
    dp_size: int = 1
    ep_size: int | None = None
    dp_attention: bool = False
    page_size: int | None = None
    mem_fraction_static: float | None = None
    max_total_tokens: int | None = None
    max_running_requests: int | None = None
    max_queued_requests: int | None = None
    chunked_prefill_size: int | None = None
    schedule_policy: SchedulePolicy = "fcfs"
    prefix_caching: bool = True
    kv_cache_dtype: KvCacheDtype = "auto"
    quantization: str | None = None
    activation_quantization: Literal["auto", "none"] = "auto"
    attention_backend: Literal["auto", "tpu", "gpu", "xla"] = "auto"
    deterministic: bool = False
    merge_lora: str | None = None
    lora: LoraConfig | None = None
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    dist_timeout_s: float = 300.0
    compilation_cache_dir: str | None = None
    log_level: str = "info"
    show_progress: bool = True

    def __post_init__(self) -> None:
        for name, flag in (
            ("context_length", "--context-length"),
            ("tp_size", "--tp-size"),
            ("dp_size", "--dp-size"),
            ("ep_size", "--ep-size"),
            ("page_size", "--page-size"),
            ("max_total_tokens", "--max-total-tokens"),
            ("max_running_requests", "--max-running-requests"),
            ("chunked_prefill_size", "--chunked-prefill-size"),
            ("nnodes", "--nnodes"),
        ):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise LaunchError(f"{flag} must be at least 1, got {value}")
        if self.ep_size is not None and self.tp_size % self.ep_size:
            raise LaunchError(f"--ep-size {self.ep_size} does not divide --tp-size {self.tp_size}")
        if self.dp_attention and self.dp_size == 1:
            raise LaunchError("--enable-dp-attention needs --dp-size above 1")
        if not 0 <= self.node_rank < self.nnodes:
            raise LaunchError(
                f"--node-rank must be 0 to {self.nnodes - 1} with --nnodes {self.nnodes}, got {self.node_rank}"
            )
        if self.nnodes > 1 and self.dist_init_addr is None:
            raise LaunchError(f"--nnodes {self.nnodes} needs --dist-init-addr, the address of host 0")
        if self.max_queued_requests is not None and self.max_queued_requests < 0:
            raise LaunchError(f"--max-queued-requests must not be negative, got {self.max_queued_requests}")
        if self.page_size is not None:
            _check_page_size(self.page_size)
        if self.mem_fraction_static is not None and not 0 < self.mem_fraction_static < 1:
            raise LaunchError(
                f"--mem-fraction-static must be between 0 and 1 (exclusive), got {self.mem_fraction_static}"
            )


def _check_page_size(page_size: int) -> None:
    if page_size < 1 or page_size & (page_size - 1):
        raise LaunchError(f"--page-size must be a power of two, got {page_size}")
