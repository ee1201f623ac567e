"""Write the tiny checkpoints of tests/golden and the logits that transformers computes for them.

Maintainers run this where torch and transformers are installed and commit the results; the tests do not run it.

Usage: python scripts/make_golden.py [NAME ...]
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
MODELS = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_wide_heads": {
        "model_type": "llama",
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3,
    },
    "llama_linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
    "llama_yarn": {"model_type": "llama", "rope_parameters": YARN},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen2_windows": {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 5,
        "head_dim": 16,
        "query_pre_attn_scalar": 12,
        "sliding_window": 10,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "olmo2": {"model_type": "olmo2"},
    "phi3": {"model_type": "phi3", "sliding_window": 20, "pad_token_id": 0},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": 2, "pad_token_id": 0},
    "mistral": {"model_type": "mistral", "head_dim": 8, "sliding_window": 12},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 3,
        "decoder_sparse_step": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "mlp_only_layers": [0],
        "num_attention_heads": 8,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        **LATENT,
        "model_type": "deepseek_v3",
        "num_hidden_layers": 4,
        "first_k_dense_replace": 2,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.5,
        "rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.2},
    },
    "deepseek_v3_whole_queries": {
        **LATENT,
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "attention_bias": True,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "rope_interleave": False,
    },
    "deepseek_v2": {
        **LATENT,
        "model_type": "deepseek_v2",
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 4.0,
        "rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.2},
    },
    "qwen3_fp8": {"model_type": "qwen3", "head_dim": 16, "intermediate_size": 64, "fp8_block": 8},
    "deepseek_v3_fp8": {
        **LATENT,
        "model_type": "deepseek_v3",
        "intermediate_size": 64,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "fp8_block": 8,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 4,
        "head_dim": 16,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "swiglu_limit": 0.75,
        "swiglu_alpha": 1.5,
        "sliding_window": 16,
        "rope_parameters": {**YARN, "truncate": False},
    },
}
# This model is stored in several files, with an index.
SHARDED = "qwen3"


def quantize(folder: Path, block: int) -> None:
    """Rewrite a checkpoint in DeepSeek's format: linear maps in float8_e4m3fn, with an f32 scale per block."""
    path, tensors = folder / "model.safetensors", {}
    for name, tensor in load_file(path).items():
        if not name.endswith("_proj.weight") and not name.endswith("kv_a_proj_with_mqa.weight"):
            tensors[name] = tensor
            continue
        scale = tensor.unfold(0, block, block).unfold(1, block, block).abs().amax((2, 3)) / 448
        tensors[f"{name}_scale_inv"] = scale
        tensors[name] = (tensor / expand(scale, block)).to(torch.float8_e4m3fn)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def dequantize(folder: Path, plain: Path, block: int) -> None:
    """Undo `quantize`, writing to the folder `plain`."""
    tensors = load_file(folder / "model.safetensors")
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    for name, scale in scales.items():
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = tensors[weight].float() * expand(scale, block)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))


def expand(scale: torch.Tensor, block: int) -> torch.Tensor:
    """Repeat the scale of each block for all of its elements."""
    return scale.repeat_interleave(block, 0).repeat_interleave(block, 1)


def make(name: str) -> None:
    """Write one checkpoint with random weights, and its logits."""
    torch.manual_seed(sum(name.encode()))
    settings = dict(MODELS[name])
    block = settings.pop("fp8_block", None)
    config = AutoConfig.for_model(settings.pop("model_type"), **(SIZES | settings))
    config._attn_implementation = "eager"  # noqa: SLF001
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in (*model.named_parameters(), *model.named_buffers()):
            if key.endswith("inv_freq"):
                continue
            if parameter.ndim == 1 or key.endswith(
                "bias"
            ):  # norms and biases start as ones and zeros, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="40KB" if name == SHARDED else "5GB")
    if block is not None:
        quantize(folder, block)
        # The logits are those of the dequantised weights.
        with tempfile.TemporaryDirectory() as plain:
            dequantize(folder, Path(plain), block)
            model = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager").eval()
    ids = torch.randint(0, config.vocab_size, (2, 60))
    with torch.no_grad():
        logits = model(ids).logits
    np.savez_compressed(folder / "golden.npz", token_ids=ids.numpy().astype(np.int32), logits=logits.numpy())
    print(f"{name}: logits of std {logits.std():.2f}")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or MODELS:
        make(wanted)
