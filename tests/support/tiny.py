"""Tiny checkpoints and tokenizers, made on the spot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxserve.text.detokenizer import byte_alphabet

VOCAB_SIZE = 260
BOS, EOS, START, END = 256, 257, 258, 259
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start>{{ message['role'] }}\n{{ message['content'] }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}


def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: one token per byte, and four special tokens."""
    vocabulary = byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<start>", "<end>")])
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names; large enough for decided argmaxes."""
    rng = np.random.default_rng(seed)
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_size, kv_size = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    out = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden) * 8,
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": normal(config["vocab_size"], hidden) * 4,
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        out |= {
            prefix + "input_layernorm.weight": np.ones(hidden, np.float32),
            prefix + "post_attention_layernorm.weight": np.ones(hidden, np.float32),
            prefix + "self_attn.q_proj.weight": normal(q_size, hidden),
            prefix + "self_attn.k_proj.weight": normal(kv_size, hidden),
            prefix + "self_attn.v_proj.weight": normal(kv_size, hidden),
            prefix + "self_attn.o_proj.weight": normal(hidden, q_size),
            prefix + "mlp.gate_proj.weight": normal(mlp, hidden),
            prefix + "mlp.up_proj.weight": normal(mlp, hidden),
            prefix + "mlp.down_proj.weight": normal(hidden, mlp),
        }
        if config["architectures"] == ["Qwen2ForCausalLM"]:
            for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
                out[f"{prefix}self_attn.{name}_proj.bias"] = normal(size)
        if config["architectures"] == ["Qwen3ForCausalLM"]:
            for name in "qk":
                out[f"{prefix}self_attn.{name}_norm.weight"] = 1 + normal(head)
    return out


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """A whole model folder; `changes` go into its config."""
    config = {**CONFIG, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(config), folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


LINEAR_MODULES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def adapter_tensors(config: dict[str, Any], rank: int, modules: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """Random factors under PEFT's names, of `LINEAR_MODULES` in every layer, `embed_tokens` and `lm_head`."""
    rng = np.random.default_rng(seed)
    out: dict[str, np.ndarray] = {}
    for name, weight in tensors(config).items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or not module.endswith(tuple(modules)):
            continue
        b_OR = (rng.standard_normal((weight.shape[0], rank)) / rank).astype(np.float32)
        a_RI = (rng.standard_normal((rank, weight.shape[1])) / np.sqrt(weight.shape[1])).astype(np.float32)
        if module.endswith("embed_tokens"):
            out[f"base_model.model.{module}.lora_embedding_A"] = np.ascontiguousarray(b_OR.T)
            out[f"base_model.model.{module}.lora_embedding_B"] = np.ascontiguousarray(a_RI.T)
        else:
            out[f"base_model.model.{module}.lora_A.weight"] = a_RI
            out[f"base_model.model.{module}.lora_B.weight"] = b_OR
    return out


def write_adapter(
    folder: Path,
    config: dict[str, Any] = CONFIG,
    *,
    rank: int = 4,
    modules: Sequence[str] = LINEAR_MODULES,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """A PEFT folder for the model of `config`; `settings` go into its `adapter_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({module.rpartition(".")[2] for module in modules})
    saved = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names, "bias": "none"} | settings
    (folder / "adapter_config.json").write_text(json.dumps(saved))
    save_file(adapter_tensors(config, rank, modules, seed), folder / "adapter_model.safetensors")
    return folder


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}


def write_gguf(path: Path, quant: str = "F32") -> dict[str, np.ndarray]:
    """The tiny model as llama.cpp would write it; returns its tensors under Hugging Face's names."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(8)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    vocabulary = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([1] * 256 + [3] * 4)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    arrays = tensors(CONFIG)
    for name, array in arrays.items():
        short = name
        for long, replacement in _GGUF_NAMES.items():
            short = short.replace(long, replacement)
        if "attn_q" in short or "attn_k" in short:
            heads = 8 if "attn_q" in short else 4
            array = array.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(array.shape)  # noqa: PLW2901
        kind = GGMLQuantizationType[quant]
        if array.ndim == 1 or quant == "F32":
            writer.add_tensor(short, array)
        else:
            writer.add_tensor(short, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays
