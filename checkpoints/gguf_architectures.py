"""Names in llama.cpp's files by architecture, and the differences between these files and Hugging Face's."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from checkpoints.gguf_views import Expansion, GateAndUp, Transposed, View
from checkpoints.source import CheckpointError

Metadata = Callable[[str, Any], Any]


class Merged(NamedTuple):
    """A tensor that is merged from one or several GGUF tensors.

    Attributes:
        view: (tensors) -> view of the merged tensor.
        parts: names of the GGUF tensors in a layer.
    """

    view: Callable[..., View]
    parts: tuple[str, ...]


class GGUFArchitecture(NamedTuple):
    """One of llama.cpp's architectures.

    Attributes:
        huggingface: name of the Hugging Face class.
        layer_names: names of a layer's tensors, with or without `.weight` and `.bias` -> Hugging Face's names;
            `{expert}` stands for the index of each expert.
        merged: Hugging Face's names of a layer's merged tensors -> how to merge them.
        permuted: whether the rows of queries and keys store the rotary pairs (i, i + H/2) as neighbours.
        norm_shift: constant that was added to the weights of norms.
        config: (lookup of metadata by the end of a key with a default, config fields that all models have) -> config
            fields that this architecture adds.
    """

    huggingface: str
    layer_names: Mapping[str, str]
    merged: Mapping[str, Merged] = {}
    permuted: bool = False
    norm_shift: float = 0.0
    config: Callable[[Metadata, Mapping[str, Any]], dict[str, Any]] = lambda *_: {}


_LLAMA: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
# llama.cpp identifies the largest Gemma 3 by its number of layers; this model scales scores by hidden size / heads.
_GEMMA3_27B_LAYERS = 62


def _gemma3(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": metadata("final_logit_softcapping", None),
        "sliding_window_pattern": int(metadata("attention.sliding_window_pattern", 6)),
        "query_pre_attn_scalar": config["hidden_size"] // heads if layers == _GEMMA3_27B_LAYERS else config["head_dim"],
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_theta": float(metadata("rope.freq_base_swa", 10_000.0))},
        },
    }


def _olmo2(metadata: Metadata, _: Mapping[str, Any]) -> dict[str, Any]:
    if metadata("attention.sliding_window", None) is not None:
        raise CheckpointError("a model with windows under the name olmo2 is OLMo 3, which is not supported")
    return {}


def _phi3(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    rotated = int(metadata("rope.dimension_count", config["head_dim"]))
    return {"partial_rotary_factor": rotated / config["head_dim"]}


def _experts(metadata: Metadata) -> dict[str, Any]:
    """Return the config fields that all MoE models have."""
    return {
        "num_experts": _required(metadata, "expert_count"),
        "num_experts_per_tok": _required(metadata, "expert_used_count"),
        "moe_intermediate_size": _required(metadata, "expert_feed_forward_length"),
    }


def _required(metadata: Metadata, key: str) -> int:
    value = metadata(key, None)
    if value is None:
        raise CheckpointError(f"metadata {key} is missing")
    return int(value)


def _qwen3_moe(metadata: Metadata, _: Mapping[str, Any]) -> dict[str, Any]:
    return {**_experts(metadata), "norm_topk_prob": True}


def _gpt_oss(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    experts = _experts(metadata)
    return {
        **experts,
        "num_local_experts": experts["num_experts"],
        "intermediate_size": experts["moe_intermediate_size"],
        "rope_parameters": {**config["rope_parameters"], "truncate": False},
    }


def _deepseek2(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    experts, rope_dim = _experts(metadata), _required(metadata, "rope.dimension_count")
    key_dim = metadata("attention.key_length_mla", None) or metadata("attention.key_length", config["head_dim"])
    # Older files contain no expert groups, but V3 uses them, so they are inferred from the number of experts.
    num_groups, top_groups = (8, 4) if experts["num_experts"] == _DEEPSEEK_V3_EXPERTS else (1, 1)
    if int(metadata("expert_gating_func", 1)) != _SIGMOID:
        raise CheckpointError("DeepSeek V2 as GGUF is not supported; V3, R1 and Kimi K2 are")
    stretch = metadata("rope.scaling.yarn_log_multiplier", None)
    # `mscale` and `mscale_all_dim` are equal in all models; files contain a tenth of the value.
    mscale = {} if stretch is None else {"mscale": 10 * float(stretch), "mscale_all_dim": 10 * float(stretch)}
    return {
        **experts,
        "n_routed_experts": experts["num_experts"],
        "n_shared_experts": int(metadata("expert_shared_count", 0)),
        "n_group": int(metadata("expert_group_count", num_groups)),
        "topk_group": int(metadata("expert_group_used_count", top_groups)),
        "scoring_func": "sigmoid",
        "norm_topk_prob": bool(metadata("expert_weights_norm", False)),
        "routed_scaling_factor": float(metadata("expert_weights_scale", 1.0)),
        "first_k_dense_replace": int(metadata("leading_dense_block_count", 0)),
        "q_lora_rank": metadata("attention.q_lora_rank", None),
        "kv_lora_rank": _required(metadata, "attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": int(key_dim) - rope_dim,
        "v_head_dim": int(
            metadata("attention.value_length_mla", None) or _required(metadata, "attention.value_length")
        ),
        "rope_parameters": {**config["rope_parameters"], **mscale},
    }


_DEEPSEEK_V3_EXPERTS = 256
_SIGMOID = 2  # value of `expert_gating_func`; 1 is softmax
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
_LATENT = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}

ARCHITECTURES: Mapping[str, GGUFArchitecture] = {
    # Mistral's files use `llama`, too.
    "llama": GGUFArchitecture("LlamaForCausalLM", _LLAMA, permuted=True),
    "qwen2": GGUFArchitecture("Qwen2ForCausalLM", _LLAMA),
    "qwen3": GGUFArchitecture("Qwen3ForCausalLM", _LLAMA),
    "qwen3moe": GGUFArchitecture("Qwen3MoeForCausalLM", {**_LLAMA, **_EXPERTS}, config=_qwen3_moe),
    "gpt-oss": GGUFArchitecture(
        "GptOssForCausalLM",
        {
            **_LLAMA,
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
            "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
        },
        merged={
            "mlp.experts.gate_up_proj": Merged(GateAndUp, ("ffn_gate_exps.weight", "ffn_up_exps.weight")),
            "mlp.experts.gate_up_proj_bias": Merged(GateAndUp, ("ffn_gate_exps.bias", "ffn_up_exps.bias")),
            "mlp.experts.down_proj": Merged(Transposed, ("ffn_down_exps.weight",)),
        },
        config=_gpt_oss,
    ),
    "deepseek2": GGUFArchitecture(
        "DeepseekV3ForCausalLM",
        {**_LLAMA, **_EXPERTS, **_LATENT},
        merged={"self_attn.kv_b_proj.weight": Merged(Expansion, ("attn_k_b.weight", "attn_v_b.weight"))},
        config=_deepseek2,
    ),
    "smollm3": GGUFArchitecture("SmolLM3ForCausalLM", _LLAMA, permuted=True),
    "olmo2": GGUFArchitecture("Olmo2ForCausalLM", {**_LLAMA, **_POST_NORMS}, config=_olmo2),
    "gemma3": GGUFArchitecture(
        "Gemma3ForCausalLM",
        {**_LLAMA, **_POST_NORMS, "ffn_norm": "pre_feedforward_layernorm"},
        norm_shift=1.0,
        config=_gemma3,
    ),
    "phi3": GGUFArchitecture(
        "Phi3ForCausalLM", {**_LLAMA, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}, config=_phi3
    ),
}
