"""Model architecture settings, from a checkpoint's `config.json`."""

from typing import Literal

from jaxserve.config.base import Config
from jaxserve.errors import LaunchError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Activation = Literal["silu", "gelu_tanh"]
RouterScores = Literal["softmax", "softmax_of_chosen", "sigmoid"]
QuantizedPart = Literal["attention", "mlp", "shared_expert", "experts"]

_MAX_EXPERTS = 4096
_MAX_MTP_LAYERS = 16


class RopeConfig(Config, frozen=True):
    """Settings of a rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        scaling: RoPE scaling type: `default`, `linear`, `llama3` or `yarn`.
        factor: factor by which the scaling stretches the context.
        original_max_position: context length that the model was first trained with, in tokens.
        low_freq_factor, high_freq_factor: llama3's two wavelength limits.
        beta_fast, beta_slow: yarn's two rotation limits.
        attention_factor: yarn's multiplier of cos and sin; None derives 0.1 ln(factor) + 1 (arXiv:2309.00071).
        truncate: yarn rounds its correction range to whole dimensions.
        frequency_divisors: precomputed divisor of each frequency (GGUF files store Llama 3's scaling this way).
    """

    theta: float = 10_000.0
    scaling: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    frequency_divisors: tuple[float, ...] | None = None


class LayerConfig(Config, frozen=True):
    """Settings that may differ between layers of one model.

    Attributes:
        window: number of keys that a query attends to, including its own; None for all.
        rope: which of the model's rotary embeddings rotates queries and keys; None for no position embedding.
        mlp: a dense MLP, or experts of which each token uses a few.
    """

    window: int | None = None
    rope: Literal["global", "local"] | None = "global"
    mlp: Literal["dense", "experts"] = "dense"

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise LaunchError(f"config.json: sliding_window must be at least 1, got {self.window}")


class MoeConfig(Config, frozen=True):
    """A mixture of experts (arXiv:1701.06538).

    Attributes:
        num_experts: routed experts per MoE layer.
        top_k: experts per token.
        intermediate_size: intermediate size of one expert.
        scores: routing weights: softmax over all experts, softmax over the chosen experts, or sigmoid.
        normalize: the weights of a token's experts are divided by their sum.
        scale: multiplier of the weights.
        correction: experts are chosen by scores with a per-expert bias, which the weights do not include
            (arXiv:2408.15664).
        num_groups, top_groups: groups of consecutive experts, and groups from which a token's experts are chosen: those
            whose best scores have the highest sum (arXiv:2412.19437, section 2.1.2).
        group_scores: best scores that are summed per group.
        bias: router and experts have biases.
        swiglu_limit: clamp of gate and up in gpt-oss's SwiGLU; None for `activation(gate) * up`.
        swiglu_alpha: multiplier of the gate in the sigmoid of gpt-oss's SwiGLU.
        shared_intermediate_size: intermediate size of the shared expert; None if there is none.
        shared_gate: the shared expert's output has a sigmoid gate.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    scores: RouterScores = "softmax"
    normalize: bool = True
    scale: float = 1.0
    correction: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_scores: int = 2
    bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    shared_intermediate_size: int | None = None
    shared_gate: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "intermediate_size", "shared_intermediate_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 2**31:
                raise LaunchError(f"config.json: {name} of experts must be a positive 32-bit number, got {value}")
        if self.num_experts > _MAX_EXPERTS:
            raise LaunchError(
                f"config.json: at most {_MAX_EXPERTS} experts per layer are supported, got {self.num_experts}"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise LaunchError(
                f"config.json: num_experts_per_tok must be 1 to {self.num_experts} experts, got {self.top_k}"
            )
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise LaunchError(
                f"config.json: {self.num_experts} experts are not divisible into {self.num_groups} groups"
            )
        own = self.num_experts // self.num_groups
        if self.num_groups > 1 and own < self.group_scores:
            raise LaunchError(f"config.json: groups need at least {self.group_scores} experts, got {own} per group")
        if not 1 <= self.top_groups <= self.num_groups or self.top_groups * own < self.top_k:
            raise LaunchError(
                f"config.json: topk_group must be 1 to {self.num_groups} and give {self.top_k} experts, "
                f"got {self.top_groups}"
            )
        if self.swiglu_limit is not None and not self.swiglu_limit > 0:
            raise LaunchError(f"config.json: swiglu_limit must be positive, got {self.swiglu_limit}")


class QuantizationConfig(Config, frozen=True):
    """Format of quantised linear weights: low-precision elements with a scale for each block.

    Attributes:
        element_type: float8_e4m3fn, int8, 4-bit integers or float4_e2m1fn.
        block: rows and columns of a block; 0 columns mean a whole row. The last blocks may be smaller.
        scale_dtype: dtype of the scales; e8m0 scales are exponents of two.
        zeros: each block of integers has a zero point.
        parts: parts of the model whose linear modules are quantised.
        unquantized_modules: names or patterns of modules that are not quantised, as the checkpoint lists them.
        activations: whether the weights were made for activations that are quantised to the same elements as a step
            runs, per token, and per block of inputs if the weights have such blocks; `requested` if the user asked.
    """

    element_type: Literal["fp8", "int8", "int4", "mxfp4"]
    block: tuple[int, int]
    scale_dtype: Literal["float32", "bfloat16", "e8m0"] = "float32"
    zeros: bool = False
    parts: tuple[QuantizedPart, ...] = ("attention", "mlp", "shared_expert", "experts")
    unquantized_modules: tuple[str, ...] = ()
    activations: Literal["exact", "quantized", "requested"] = "exact"


class MlaConfig(Config, frozen=True):
    """Multi-head latent attention: all heads share a cached latent vector (arXiv:2405.04434, section 2.1).

    Fields are named as in `config.json`.

    Attributes:
        q_lora_rank: rank of the query projection; None if the projection is one matrix.
        kv_lora_rank: channels of the latent vector.
        qk_rope_head_dim: rotated channels of a key, which all heads share.
        qk_nope_head_dim: channels of a head's key that are projected from the latent vector.
        v_head_dim: channels of a head's value, projected from the latent vector.
        interleaved: the two channels of a rotated pair are adjacent.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    interleaved: bool = True

    def __post_init__(self) -> None:
        for name in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 2**31:
                raise LaunchError(f"config.json: {name} must be positive, got {value}")


class ModelConfig(Config, frozen=True):
    """Architecture of a decoder-only transformer, from the checkpoint's `config.json`.

    Attributes:
        architecture: Hugging Face class name; a key of `jaxserve.models.registry`.
        layers: settings of each layer, in order.
        max_position: context length that the model was trained for, in tokens.
        local_rope: rotary embedding of the layers whose `rope` is `local`.
        embedding_scale: multiplier of token embeddings.
        attention_scale: multiplier of attention scores; None for 1 / sqrt(head_dim).
        activation: activation function of the MLP.
        moe: mixture of experts of the layers whose `mlp` is `experts`.
        mla: multi-head latent attention, with one KV head whose value is a part of its key.
        quantization: format of the quantised weights, and the parts of the model that use it.
        num_mtp_layers: multi-token prediction layers after these layers, which are not loaded.
        attention_sinks: every head has an extra score that takes probability but has no value.
        qk_norm: how queries and keys are normalised: per head, or over the whole projection.
        norm_offset: constant added to the norms' weights.
        dtype: dtype that the checkpoint declares.
        eos_token_ids: the model's end-of-sequence tokens.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerConfig, ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    activation: Activation = "silu"
    moe: MoeConfig | None = None
    mla: MlaConfig | None = None
    quantization: QuantizationConfig | None = None
    num_mtp_layers: int = 0
    attention_sinks: bool = False
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    norm_offset: float = 0.0
    dtype: Dtype = "float32"
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self.layers)

    def quantized(self, part: QuantizedPart) -> QuantizationConfig | None:
        """Return the quantisation of a part's linear modules, or None if they are not quantised."""
        return self.quantization if self.quantization is not None and part in self.quantization.parts else None

    @property
    def rope_dim(self) -> int:
        """Number of rotated channels per head."""
        return self.head_dim if self.mla is None else self.mla.qk_rope_head_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct attention windows of the layers."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_q_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        ):
            value = getattr(self, name)
            if not 0 < value < 2**31:
                raise LaunchError(f"config.json: {name} must be a positive 32-bit number, got {value}")
        if self.num_q_heads % self.num_kv_heads:
            raise LaunchError(
                f"config.json: {self.num_q_heads} query heads do not divide into {self.num_kv_heads} key heads"
            )
        if not 0 <= self.num_mtp_layers <= _MAX_MTP_LAYERS:
            raise LaunchError(
                f"config.json: num_nextn_predict_layers must be 0 to {_MAX_MTP_LAYERS}, got {self.num_mtp_layers}"
            )
        if self.rope_dim % 2:
            raise LaunchError(f"config.json: head_dim must be even for rotary embedding, got {self.rope_dim}")
