"""Overfit tiny models of four families, with torch and transformers, to the outputs of `tests/support/memorized.py`.

PYTHONPATH=. python scripts/make_memorized_families.py [FAMILY ...]
"""

import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jaxserve.text.tokenizer import load_tokenizer
from tests.support.memorized import FAMILIES, MEMORIZED, Memorized
from tests.support.tiny import BOS, EOS

MODELS = Path(__file__).parents[1] / "tests" / "models"
CONTEXT, STEPS, SMALL_ENOUGH = 512, 1500, 1e-3
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "deepseek": {"model_type": "deepseek_v3", **LATENT, "n_group": 4, "topk_group": 2},
    "kimi": {"model_type": "deepseek_v3", **LATENT, "n_group": 1, "topk_group": 1},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "intermediate_size": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
    },
}


def write_tokenizer(family: str, folder: Path) -> None:
    """Write the tokenizer of `tests/models/memorized`; for Kimi, the same tokens as a `tiktoken.model`."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS / "memorized" / name, folder / name)
    if family != "kimi":
        return
    tokens = json.loads((folder / "tokenizer.json").read_text())
    back = {letter: byte for byte, letter in bytes_to_unicode().items()}
    ranks = sorted(tokens["model"]["vocab"].items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(bytes([back[letter]])).decode()} {rank}" for letter, rank in ranks]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        str(token["id"]): {"content": token["content"], "special": token["special"]} for token in tokens["added_tokens"]
    }
    settings["tokenizer_class"] = "TikTokenTokenizer"
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").unlink()


def examples(folder: Path, cases: list[Memorized]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of prompts and outputs, [B, T], and their labels; -100 for tokens that are not learnt."""
    tokenizer = load_tokenizer(folder)
    rows: list[tuple[list[int], int]] = []
    for case in cases:
        prompt = tokenizer.chat_template.render([{"role": "user", "content": case.name}], {"opening": case.opening})
        first, last = (
            tokenizer.encode(text, add_special_tokens=False, max_tokens=CONTEXT) for text in (prompt, case.output)
        )
        rows.append(([*first, *last, EOS], len(first)))
    width = max(len(ids) for ids, _ in rows)
    tokens_BT = torch.tensor([ids + [EOS] * (width - len(ids)) for ids, _ in rows])
    labels_BT = torch.tensor([[-100] * start + ids[start:] + [-100] * (width - len(ids)) for ids, start in rows])
    return tokens_BT, labels_BT


def make(family: str) -> int:
    """Write the family's model; return the number of tokens that it has not learnt."""
    folder = MODELS / f"memorized_{family}"
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(family, folder)
    cases = [case for case in MEMORIZED if case.name in FAMILIES[family]]
    tokens_BT, labels_BT = examples(folder, cases)
    vocab_size = json.loads((MODELS / "memorized" / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    settings = {**COMMON, **CONFIGS[family], "vocab_size": vocab_size}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for number in range(STEPS):
        loss = model(input_ids=tokens_BT, labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if number % 100 == 0:
            print(family, number, loss.item(), flush=True)
        if loss < SMALL_ENOUGH:
            break
    # Weights are stored in bf16 and run in f32.
    model.bfloat16().save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    path = folder / "config.json"
    changes = {"dtype": "float32"} | ({"model_type": "kimi_k2"} if family == "kimi" else {})
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=1) + "\n")
    with torch.no_grad():
        best_BT = model.float()(input_ids=tokens_BT).logits[:, :-1].argmax(-1)
    wanted_BT = labels_BT[:, 1:]
    wrong = int(((best_BT != wanted_BT) & (wanted_BT != -100)).sum())
    print(f"{family}: {wrong} of {int((wanted_BT != -100).sum())} tokens wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(int(sum(make(family) for family in sys.argv[1:] or CONFIGS) > 0))
