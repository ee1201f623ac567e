"""Write the model that measures serving overhead: a random two-layer Qwen3 with the demo model's tokenizer.

Hidden size 64, 4 query and 2 KV heads of dim 128, MLP size 128; 3.4 M weights, nearly all in the tied embedding.

    python scripts/bench/overhead_model.py FOLDER
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxserve.layers.args import DecoderArgs
from jaxserve.loading.hub import find_model
from jaxserve.models.qwen3 import ARCHITECTURE
from jaxserve.text.tokenizer import load_tokenizer

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    """Write config, tokenizer and weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    tokenizer = load_tokenizer(find_model("demo", None, None))
    tokenizer.save(folder)
    config = {**CONFIG, "vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_ids[0]}
    (folder / "config.json").write_text(json.dumps(config))
    model = ARCHITECTURE.read_config(config)
    specs = ARCHITECTURE.build(DecoderArgs(model, jnp.dtype(jnp.bfloat16))).param_specs
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for path, name in ARCHITECTURE.tensor_names(model).items():
        shape = specs[path].shape[1:] if specs[path].stacked else specs[path].shape
        for layer in specs[path].layers or (0,):
            values = np.ones(shape) if "norm" in name.pattern else 0.02 * rng.standard_normal(shape)
            tensors[name.of_layer(layer)] = values.astype(jnp.bfloat16)
    save_file(tensors, folder / "model.safetensors")


if __name__ == "__main__":
    main()
