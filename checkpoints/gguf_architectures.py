"""What llama.cpp's files of each architecture call things, and where they differ from Hugging Face's."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from checkpoints.source import CheckpointError

Metadata = Callable[[str, Any], Any]


class GGUFArchitecture(NamedTuple):
    """One of llama.cpp's architectures.

    Attributes:
        huggingface: name of the class.
        layer_names: stems of a layer's tensors -> Hugging Face's.
        permuted: rows of queries and keys have the rotary pairs (i, i + H/2) as neighbours.
        norm_shift: what was added to the weights of norms.
        config: (metadata by the end of a key and a default, what `config.json` has of every model) -> what this adds.
    """

    huggingface: str
    layer_names: Mapping[str, str]
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
# llama.cpp knows the largest Gemma 3 by its layers; it scales scores by the width of a head's share of the hidden size.
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


ARCHITECTURES: Mapping[str, GGUFArchitecture] = {
    # Mistral's files say `llama`, too.
    "llama": GGUFArchitecture("LlamaForCausalLM", _LLAMA, permuted=True),
    "qwen2": GGUFArchitecture("Qwen2ForCausalLM", _LLAMA),
    "qwen3": GGUFArchitecture("Qwen3ForCausalLM", _LLAMA),
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
