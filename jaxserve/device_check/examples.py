"""The models that are checked if the user names none: small ones, with every variant of the kernels."""

from collections.abc import Mapping
from typing import Any

_SIZES: dict[str, Any] = {
    "vocab_size": 5000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "hidden_act": "silu", "rope_theta": 1e6,
}  # fmt: skip

DENSE: dict[str, Any] = _SIZES | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1024,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
    "attention_bias": False,
}  # fmt: skip
WINDOWS_AND_MXFP4: dict[str, Any] = _SIZES | {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 256, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 64,
    "attention_bias": True, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"],
    "num_local_experts": 32, "num_experts_per_tok": 4, "swiglu_limit": 7.0,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
    },
}  # fmt: skip
LATENT_AND_FP8: dict[str, Any] = _SIZES | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 16,
    "attention_bias": False, "q_lora_rank": 256, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "first_k_dense_replace": 1, "n_routed_experts": 64, "num_experts_per_tok": 8,
    "moe_intermediate_size": 256, "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    },
}  # fmt: skip

EXAMPLES: Mapping[str, dict[str, Any]] = {
    "dense": DENSE,
    "windows, sinks and MXFP4 experts": WINDOWS_AND_MXFP4,
    "MLA and FP8 experts": LATENT_AND_FP8,
}
