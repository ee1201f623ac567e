"""Golden checkpoints, written as llama.cpp would with its own table of tensor names, are read back unchanged."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
from gguf.constants import MODEL_ARCH_NAMES

from checkpoints.gguf import GGUFCheckpoint
from checkpoints.huggingface import HuggingFaceCheckpoint
from checkpoints.source import CheckpointError
from jaxserve.errors import LaunchError
from jaxserve.models.registry import find_architecture

GOLDEN = Path(__file__).parent.parent / "golden"
# llama.cpp's name of each architecture, and its metadata besides the sizes that all files have.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "gemma3": {
        "attention.sliding_window_pattern": 2,
        "rope.freq_base_swa": 100.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    },
    "qwen3moe": {"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 16},
    "gpt-oss": {
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 24,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
    },
    "deepseek2": {
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_feed_forward_length": 16,
        "expert_shared_count": 2,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 1.5,
        "leading_dense_block_count": 2,
        "attention.q_lora_rank": 24,
        "attention.kv_lora_rank": 16,
        "attention.key_length_mla": 20,
        "attention.value_length_mla": 10,
        "rope.dimension_count": 8,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_log_multiplier": 0.12,
    },
}
FOLDERS = {"qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "deepseek2": "deepseek_v3"}
NUM_HEADS, NUM_KV_HEADS = 4, 2
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)\d+\.(\w+\.weight)")


def as_converted(family: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stack the experts of a layer, split gate from up projections, and split `kv_b_proj` into keys and values."""
    out: dict[str, Any] = {}
    for name, array in tensors.items():
        if found := _EXPERT.fullmatch(name):
            out.setdefault(found[1] + found[2], []).append(array)
        elif "experts.gate_up_proj" in name:
            rows = array.swapaxes(1, 2) if array.ndim > 2 else array
            kind = "bias" if name.endswith("bias") else "weight"
            for own, first in (("gate_proj", 0), ("up_proj", 1)):
                out[f"{name.partition('gate_up')[0]}{own}.{kind}"] = rows[:, first::2]
        elif "experts.down_proj" in name and family == "gpt-oss":
            kind = "bias" if name.endswith("bias") else "weight"
            stored = array if kind == "bias" else array.swapaxes(1, 2)
            out[f"{name.partition('down_proj')[0]}down_proj.{kind}"] = stored
        elif "kv_b_proj" in name:
            both = array.reshape(NUM_HEADS, 12 + 10, -1)
            out[name.replace("kv_b", "k_b")] = both[:, :12].swapaxes(1, 2)
            out[name.replace("kv_b", "v_b")] = both[:, 12:]
        else:
            out[name] = array
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def pairs_as_neighbours(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Make the rows of rotated pairs neighbours in queries and keys, as the converter does for Llama's rope."""
    halves = array.reshape(num_heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def write(path: Path, family: str, extra: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Write a golden checkpoint as GGUF, and return its tensors under Hugging Face's names."""
    source = HuggingFaceCheckpoint(GOLDEN / FOLDERS.get(family, family))
    config = dict(source.config)
    tensors = {name: source.read(name, (slice(None),) * len(shape)) for name, shape in source.shapes.items()}
    source.close()
    num_layers = config["num_hidden_layers"]
    # DeepSeek's multi-token prediction layer is not converted.
    tensors = {name: array for name, array in tensors.items() if f"layers.{num_layers}." not in name}
    if family == "qwen3moe":  # its files have no layers without experts
        tensors = {name: array for name, array in tensors.items() if not name.startswith("model.layers.0.mlp.")}
        first = {name: array for name, array in tensors.items() if name.startswith("model.layers.1.mlp.")}
        tensors |= {name.replace("layers.1.", "layers.0."): array for name, array in first.items()}
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    for key, value in FAMILIES[family].items():
        {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)](
            f"{family}.{key}", value
        )
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, array in as_converted(family, tensors).items():
        stored = array.astype(np.float32)
        if family in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
            stored = pairs_as_neighbours(stored, NUM_HEADS if "q_proj" in name else NUM_KV_HEADS)
        if family == "gemma3" and name.endswith("norm.weight"):
            stored = stored + 1
        # The converter also renames these, whose names end in neither .weight nor .bias.
        known = name.replace("correction_bias", "correction.bias").replace("attn.sinks", "attn.sinks.weight")
        writer.add_tensor(names.get_name(known, try_suffixes=(".weight", ".bias")), stored)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_config_come_back(family: str, tmp_path: Path) -> None:
    tensors = write(tmp_path / "x.gguf", family)
    file = GGUFCheckpoint(tmp_path / "x.gguf")
    assert file.shapes == {name: array.shape for name, array in tensors.items()}
    for name, array in tensors.items():
        got = file.read(name, (slice(None),) * array.ndim)
        np.testing.assert_allclose(got, array, atol=1e-6 if family == "gemma3" else 0, err_msg=name)
        part = (slice(1, 3), *(slice(size // 2, size) for size in array.shape[1:]))
        np.testing.assert_array_equal(file.read(name, part), got[part], err_msg=name)
    config = json.loads((GOLDEN / FOLDERS.get(family, family) / "config.json").read_text())
    if family == "deepseek2":  # files have one factor for both, and no multi-token prediction layer
        config["rope_parameters"] |= {"mscale": 1.2, "mscale_all_dim": 1.2}
        config["num_nextn_predict_layers"] = 0
    if family == "qwen3moe":
        config["mlp_only_layers"] = []
    if family == "gpt-oss":  # files cannot hold these, so the values of the published models are used
        config |= {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    architecture = find_architecture(file.config)
    want, got_config = architecture.model_config(config), architecture.model_config(file.config)
    # Files do not contain the scale of attention scores, and their config always asks for bf16.
    same = {"dtype": want.dtype, "eos_token_ids": want.eos_token_ids, "attention_scale": want.attention_scale}
    if family == "phi3":  # nor the context that an unscaled rotary embedding was trained with
        same["rope"] = msgspec.structs.replace(got_config.rope, original_max_position=want.rope.original_max_position)
    if family == "smollm3":  # files cannot hold which layers have no rope: it is every fourth layer
        same["layers"] = want.layers
    assert msgspec.structs.replace(got_config, **same) == want
    if family == "gemma3":
        assert got_config.attention_scale == config["head_dim"] ** -0.5
    if family == "smollm3":
        assert [layer.rope for layer in got_config.layers] == ["global"] * 3 + [None]


def test_longrope_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", "phi3", {"rope_factors_long.weight": np.ones(4, np.float32)})
    file = GGUFCheckpoint(tmp_path / "x.gguf")
    with pytest.raises(LaunchError, match="'longrope' is not supported"):
        find_architecture(file.config).model_config(file.config)


def test_metadata_that_cannot_be_meant_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family, key, value, message in (
        ("olmo2", "attention.sliding_window", 128, "OLMo 3"),
        ("gemma3", "rope.freq_base_swa", "much", "could not convert"),
        ("deepseek2", "expert_gating_func", 1, "DeepSeek V2 as GGUF is not supported"),
    ):
        monkeypatch.setitem(FAMILIES, family, {**FAMILIES[family], key: value})
        write(tmp_path / f"{family}.gguf", family)
        with pytest.raises(CheckpointError, match=message):
            _ = GGUFCheckpoint(tmp_path / f"{family}.gguf").config
    monkeypatch.setitem(FAMILIES, "gemma3", {"final_logit_softcapping": 30.0})
    write(tmp_path / "capped.gguf", "gemma3")
    file = GGUFCheckpoint(tmp_path / "capped.gguf")
    with pytest.raises(LaunchError, match="final_logit_softcapping is not supported"):
        find_architecture(file.config).model_config(file.config)


def test_a_tensor_of_another_architecture_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", "qwen3", {"blk.0.post_ffw_norm.weight": np.ones(32, np.float32)})
    with pytest.raises(CheckpointError, match=r"blk\.0\.post_ffw_norm\.weight' is unknown in this architecture"):
        GGUFCheckpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.99])
def test_a_file_that_was_cut_off_says_where(tmp_path: Path, share: float) -> None:
    write(tmp_path / "x.gguf", "qwen3")
    data = (tmp_path / "x.gguf").read_bytes()
    end = int(len(data) * share)
    (tmp_path / "x.gguf").write_bytes(data[:end])
    with pytest.raises(CheckpointError, match=rf"x\.gguf.*the file is truncated at byte {end}, inside"):
        GGUFCheckpoint(tmp_path / "x.gguf")
