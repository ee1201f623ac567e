"""Write random LoRA adapters with PEFT next to the checkpoints of tests/golden, and their transcripts.

Maintainers run this where torch, transformers and peft are installed and commit the results; the tests do not run it.

Usage: python scripts/make_golden_adapters.py [MODEL ...]
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# (model, adapter) -> the PEFT config.
ADAPTERS = {
    ("qwen3", "attention"): {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    ("qwen3", "patterns"): {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": [*LINEAR, "embed_tokens", "lm_head"],
        "rank_pattern": {"k_proj": 2, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"up_proj": 3, "layers.0.self_attn.q_proj": 12},
    },
    ("llama", "linear"): {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"},
    ("gemma3", "linear"): {"r": 4, "lora_alpha": 6, "target_modules": [*LINEAR, "embed_tokens"]},
    ("phi3", "fused"): {"r": 4, "lora_alpha": 6, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj"]},
    ("mistral", "mlp"): {"r": 3, "lora_alpha": 6, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    ("qwen2_moe", "linear"): {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    ("qwen3_moe", "linear"): {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    ("mixtral", "experts"): {"r": 2, "lora_alpha": 3, "target_modules": ["w1", "w2", "w3", "q_proj"]},
    ("gpt_oss", "parameters"): {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": "all-linear",
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "router.weight"],
    },
    ("deepseek_v3", "linear"): {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    ("deepseek_v3_whole_queries", "down"): {
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["kv_b_proj", "q_proj"],
        "target_parameters": ["mlp.experts.down_proj"],
    },
}
NUM_TOKENS = 32
# Minimum gap between the two largest logits, whose magnitude is 10; the tests compute them in f32.
_MIN_GAP = 1e-2


def make(model_name: str, name: str) -> None:
    """Write one adapter with random LoRA matrices, and the greedy transcripts of the model with it."""
    # Adapters with which rounding could decide a token are replaced, using the next seed.
    for seed in range(100):
        try:
            _make(model_name, name, seed)
        except _TooClose:
            continue
        return
    raise RuntimeError("all transcripts have tokens that are nearly as likely as others")


class _TooClose(Exception):
    """The two likeliest tokens are almost equally likely."""


def _make(model_name: str, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / model_name, dtype=torch.float32).eval()
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTERS[model_name, name])
    prompts = torch.randint(0, base.config.vocab_size, (3, 12))
    alone = _continue(base, prompts)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    tuned = _continue(model, prompts)
    assert (tuned != alone).any(dim=1).all()
    folder = GOLDEN / model_name / "adapters" / name
    model.peft_config["default"].base_model_name_or_path = model_name
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    np.savez_compressed(
        folder / "golden.npz", prompts=prompts.numpy().astype(np.int32), transcripts=tuned.numpy().astype(np.int32)
    )
    print(f"{model_name} {name}: {tuned[0, :8].tolist()}, without {alone[0, :8].tolist()}")


def _continue(model: torch.nn.Module, prompts: torch.Tensor) -> torch.Tensor:
    """Return greedy tokens after each prompt; raise _TooClose if rounding could decide one."""
    ids = prompts
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            scores = model(ids).logits[:, -1]
        best = scores.topk(2).values
        if (best[:, 0] - best[:, 1]).min() < _MIN_GAP:
            raise _TooClose
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompts.shape[1] :]


if __name__ == "__main__":
    for wanted in ADAPTERS:
        if wanted[0] in (sys.argv[1:] or [wanted[0]]):
            make(*wanted)
