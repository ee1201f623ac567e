"""Overfit a tiny Llama to the outputs of `tests/support/memorized.py` and write it to tests/models/memorized.

PYTHONPATH=. python scripts/make_memorized.py
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from safetensors.numpy import save_file
from tokenizers import AddedToken

from jaxserve.text.tokenizer import load_tokenizer
from tests.support.memorized import CHAT_TEMPLATE, MEMORIZED, SPECIAL_TOKENS
from tests.support.tiny import CONFIG, EOS, byte_tokenizer, tensors

FOLDER = Path(__file__).parents[1] / "tests" / "models" / "memorized"
HIDDEN, HEADS, KV_HEADS, HEAD, MLP, LAYERS, CONTEXT = 96, 4, 2, 32, 256, 2, 512
STEPS = 3000


def write_tokenizer() -> int:
    """Write a tokenizer of bytes and the families' special tokens; return its vocabulary size."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def examples() -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of prompts and outputs, i32[B, T], and a mask of those to learn, f32[B, T]."""
    tokenizer = load_tokenizer(FOLDER)
    rows: list[tuple[list[int], int]] = []
    for case in MEMORIZED:
        prompt = tokenizer.chat_template.render([{"role": "user", "content": case.name}], {"opening": case.opening})
        first, last = (
            tokenizer.encode(text, add_special_tokens=False, max_tokens=CONTEXT) for text in (prompt, case.output)
        )
        rows.append(([*first, *last, EOS], len(first)))
    width = max(len(ids) for ids, _ in rows)
    tokens_BT = np.zeros((len(rows), width), np.int32)
    wanted_BT = np.zeros((len(rows), width), np.float32)
    for index, (ids, start) in enumerate(rows):
        tokens_BT[index, : len(ids)] = ids
        wanted_BT[index, start : len(ids)] = 1
    return tokens_BT, wanted_BT


def logits(weights: dict[str, Any], tokens_BT: jax.Array) -> jax.Array:
    """Run Llama's forward pass without a KV cache."""

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + CONFIG["rms_norm_eps"]) * weight

    length = tokens_BT.shape[1]
    frequencies = CONFIG["rope_theta"] ** -(jnp.arange(0, HEAD, 2) / HEAD)
    angles = jnp.concatenate([jnp.arange(length)[:, None] * frequencies] * 2, -1)

    def rotate(x_BTNH: jax.Array) -> jax.Array:
        left, right = jnp.split(x_BTNH, 2, -1)
        cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
        return x_BTNH * cos + jnp.concatenate([-right, left], -1) * sin

    x = weights["model.embed_tokens.weight"][tokens_BT]
    hidden_by_order = jnp.triu(jnp.full((length, length), -1e9), 1)
    for layer in range(LAYERS):
        own = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{layer}.")}
        h = norm(x, own["input_layernorm.weight"])
        q, k, v = (
            (h @ own[f"self_attn.{name}_proj.weight"].T).reshape(*h.shape[:2], -1, HEAD) for name in ("q", "k", "v")
        )
        k, v = (jnp.repeat(array, HEADS // KV_HEADS, 2) for array in (rotate(k), v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", rotate(q), k) / HEAD**0.5 + hidden_by_order
        o = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores), v).reshape(*h.shape[:2], -1)
        x = x + o @ own["self_attn.o_proj.weight"].T
        h = norm(x, own["post_attention_layernorm.weight"])
        gate, up = (h @ own[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (jax.nn.silu(gate) * up) @ own["mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def train(weights: dict[str, Any], tokens_BT: np.ndarray, wanted_BT: np.ndarray) -> dict[str, Any]:
    """Train with AdamW until every token is far ahead of the second best."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=1e-4)
    state = optimizer.init(weights)

    def loss(weights: dict[str, Any]) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(weights, tokens_BT[:, :-1]), jnp.asarray(tokens_BT[:, 1:])
        )
        return jnp.sum(losses * wanted_BT[:, 1:]) / jnp.sum(wanted_BT)

    @jax.jit
    def step(weights: dict[str, Any], state: Any) -> tuple[dict[str, Any], Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(weights)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value

    for number in range(STEPS):
        weights, state, value = step(weights, state)
        if number % 100 == 0:
            print(number, float(value), flush=True)
        if value < 2e-4:
            break
    return weights


def main() -> int:
    """Write the model; return 1 if it has not learnt its text."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    config = {
        **CONFIG, "vocab_size": write_tokenizer(), "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD,
        "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    (FOLDER / "config.json").write_text(json.dumps(config, indent=1))
    tokens_BT, wanted_BT = examples()
    start = {
        name: jnp.asarray(array * (0.1 if "embed" in name or "lm_head" in name else 1))
        for name, array in tensors(config).items()
    }
    weights = train(start, tokens_BT, wanted_BT)
    stored = {name: np.asarray(array).astype(ml_dtypes.bfloat16) for name, array in weights.items()}
    save_file(stored, FOLDER / "model.safetensors")
    rounded = {name: jnp.asarray(array.astype(np.float32)) for name, array in stored.items()}
    best_BT = np.asarray(jnp.argmax(logits(rounded, tokens_BT[:, :-1]), -1))
    wrong = int(np.sum((best_BT != tokens_BT[:, 1:]) * wanted_BT[:, 1:]))
    print(f"{wrong} of {int(wanted_BT.sum())} tokens wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
