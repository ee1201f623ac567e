"""Reading of adapter folders: what PEFT writes is accepted, and what is not supported is refused by name."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints.adapters import read_peft
from checkpoints.orbax_adapters import read_adapter, save_adapter
from checkpoints.source import CheckpointError
from tests.support.tiny import CONFIG, LINEAR_MODULES, write_adapter

Q_PROJ = "model.layers.1.self_attn.q_proj"


def test_lora_a_b_and_scale(tmp_path: Path) -> None:
    adapter = read_peft(write_adapter(tmp_path, base_model_name_or_path="some/base"))
    assert adapter.base_model == "some/base"
    assert adapter.rank == 4
    assert len(adapter.modules) == len(LINEAR_MODULES) * CONFIG["num_hidden_layers"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    found = adapter.modules[Q_PROJ]
    np.testing.assert_array_equal(found.a_RI, saved[f"base_model.model.{Q_PROJ}.lora_A.weight"])
    np.testing.assert_array_equal(found.b_OR, saved[f"base_model.model.{Q_PROJ}.lora_B.weight"])
    assert found.scale == 2.0


def test_lora_of_an_embedding_is_transposed(tmp_path: Path) -> None:
    adapter = read_peft(write_adapter(tmp_path, modules=["embed_tokens", "lm_head"]))
    for module in ("model.embed_tokens", "lm_head"):
        found = adapter.modules[module]
        assert (found.b_OR @ found.a_RI).shape == (CONFIG["vocab_size"], CONFIG["hidden_size"])


@pytest.mark.parametrize(
    ("settings", "module", "scale"),
    [
        ({"lora_alpha": 6}, Q_PROJ, 1.5),
        ({"lora_alpha": 6, "use_rslora": True}, Q_PROJ, 6 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 12}}, Q_PROJ, 3.0),
        ({"alpha_pattern": {"q_proj": 12}}, "model.layers.1.self_attn.k_proj", 2.0),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 12}}, Q_PROJ, 3.0),
        ({"alpha_pattern": {"model\\.layers\\.1\\.self_attn\\.q_proj": 12}}, Q_PROJ, 3.0),
        ({"alpha_pattern": {"^q_proj": 12}}, Q_PROJ, 2.0),
        ({"alpha_pattern": {f"^{Q_PROJ}": 12}}, Q_PROJ, 3.0),
        ({"alpha_pattern": {"0.self_attn.q_proj": 12, "q_proj": 4}}, Q_PROJ, 1.0),
        ({"target_modules": "all-linear"}, Q_PROJ, 2.0),
    ],
)
def test_scale(settings: dict[str, Any], module: str, scale: float, tmp_path: Path) -> None:
    assert read_peft(write_adapter(tmp_path, **settings)).modules[module].scale == scale


def test_ranks_by_pattern(tmp_path: Path) -> None:
    write_adapter(tmp_path, rank=4)
    wide = write_adapter(tmp_path / "wide", rank=8, modules=["self_attn.q_proj"])
    merged = load_file(tmp_path / "adapter_model.safetensors") | load_file(wide / "adapter_model.safetensors")
    save_file(merged, tmp_path / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": {"q_proj": 8}}))
    adapter = read_peft(tmp_path)
    assert adapter.rank == 8
    assert adapter.modules[Q_PROJ].scale == 1.0
    assert adapter.modules["model.layers.0.mlp.up_proj"].scale == 2.0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is supported"),
        ({"use_dora": True}, "use_dora is True: DoRA is not supported"),
        (
            {"modules_to_save": ["lm_head"]},
            r"modules_to_save is \['lm_head'\]: fully trained modules are not supported",
        ),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"target_parameters": ["experts.down"]}, "target_parameters: there is no LoRA of experts.down"),
        ({"r": 0}, "ranks must be at least 1, got 0"),
        ({"r": "4"}, "Expected `int`, got `str`"),
        ({"r": 8}, "the config asks for rank 8"),
        ({"lora_alpha": None}, "Expected `float`, got `null`"),
        ({"rank_pattern": {"(a+)+$": 8}}, "only names of modules are supported"),
    ],
)
def test_what_is_not_supported_is_refused(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_peft(write_adapter(tmp_path, **settings))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({f"{Q_PROJ}.lora_B.weight": None}, f"{Q_PROJ}: lora_B is missing"),
        ({f"{Q_PROJ}.lora_A.weight": np.full((4, 64), np.nan, np.float32)}, f"{Q_PROJ}: values that are not finite"),
        ({f"{Q_PROJ}.lora_B.weight": np.ones((64, 3), np.float32)}, r"lora_A is \(4, 64\), lora_B \(64, 3\)"),
        ({f"{Q_PROJ}.lora_magnitude_vector": np.ones(64, np.float32)}, "1 tensors are not LoRA weights of a module"),
        ({f"{Q_PROJ}.weight": np.ones((64, 64), np.float32)}, "1 tensors are not LoRA weights of a module"),
    ],
)
def test_broken_tensors_are_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path) | {f"base_model.model.{name}": value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    with pytest.raises(CheckpointError, match=reason):
        read_peft(tmp_path)


# Shapes of a layer with two experts, intermediate size 6, hidden size 8 and rank 3.
EXPERTS = "model.layers.0.mlp.experts"
MATRICES = {
    f"{EXPERTS}.base_layer.lora_A.weight": (6, 8),
    f"{EXPERTS}.base_layer.lora_B.weight": (12, 6),
    f"{EXPERTS}.lora_A.weight": (6, 6),
    f"{EXPERTS}.lora_B.weight": (8, 6),
}


def write_parameters(folder: Path, shapes: Mapping[str, tuple[int, ...]], targets: list[str]) -> Path:
    write_adapter(folder, rank=3, modules=["q_proj"], target_parameters=targets)
    rng = np.random.default_rng(0)
    tensors = {
        f"base_model.model.{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_parameters_with_all_experts(tmp_path: Path) -> None:
    """The innermost wrapper belongs to the first parameter; rows of A are ordered by expert, columns of B by rank."""
    folder = write_parameters(tmp_path, MATRICES, ["experts.down_proj", "mlp.experts.gate_up_proj"])
    modules = read_peft(folder).modules
    assert modules.keys() == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    saved = load_file(folder / "adapter_model.safetensors")
    for name, inner in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        a, b = (saved[f"base_model.model.{EXPERTS}{inner}.lora_{matrix}.weight"] for matrix in "AB")
        found = modules[f"{EXPERTS}.{name}"]
        for expert in range(2):
            np.testing.assert_array_equal(found.a_RI[expert], a[3 * expert : 3 * expert + 3])
            np.testing.assert_array_equal(found.b_OR[expert], b[:, expert::2])
    save_adapter(tmp_path / "orbax", read_peft(folder))
    for name, tensors in read_adapter(tmp_path / "orbax").modules.items():
        np.testing.assert_array_equal(tensors.a_RI, modules[name].a_RI)
        np.testing.assert_array_equal(tensors.b_OR, modules[name].b_OR)


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (["experts.down_proj"], "2 of its parameters are adapted; known are model.layers.0.mlp.experts.down_proj"),
        (["down_proj", "gate_up_proj", "gate_up_proj_bias"], "there is no LoRA of gate_up_proj_bias"),
    ],
)
def test_parameters_that_do_not_fit_their_names(targets: list[str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_peft(write_parameters(tmp_path, MATRICES, targets))


def test_missing_files_are_reported_and_pickles_never_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json does not exist"):
        read_peft(tmp_path)
    (write_adapter(tmp_path) / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle file, which can run code"):
        read_peft(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="no module is adapted"):
        read_peft(tmp_path)


def test_an_orbax_folder_holds_the_same(tmp_path: Path) -> None:
    adapter = read_peft(
        write_adapter(tmp_path / "peft", modules=["q_proj", "embed_tokens"], base_model_name_or_path="b")
    )
    save_adapter(tmp_path / "orbax", adapter)
    restored = read_adapter(tmp_path / "orbax")
    assert restored.base_model == "b"
    assert restored.modules.keys() == adapter.modules.keys()
    for name, tensors in adapter.modules.items():
        for got, want in zip(restored.modules[name], tensors, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda text: text.replace("orbax-adapter", "other"), "format 'other' is not supported"),
        (lambda text: text.replace('"rank"', '"rang"'), "unknown field `rang`|missing required field"),
        (lambda text: text.replace('"rank": 4', '"rank": 5'), "factors"),
        (lambda text: "{", "Input data was truncated"),
    ],
)
def test_a_broken_orbax_folder_is_reported(broken: Any, reason: str, tmp_path: Path) -> None:
    save_adapter(tmp_path / "orbax", read_peft(write_adapter(tmp_path / "peft", modules=["q_proj"])))
    manifest = tmp_path / "orbax" / "jaxserve-adapter.json"
    manifest.write_text(broken(manifest.read_text()))
    with pytest.raises(CheckpointError, match=reason):
        read_adapter(tmp_path / "orbax")
