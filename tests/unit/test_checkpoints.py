"""Reading of safetensors and GGUF files, and refusal of hostile, broken and pickled ones."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import save_file

from checkpoints.gguf import GGUFCheckpoint
from checkpoints.huggingface import HuggingFaceCheckpoint
from checkpoints.safetensors_file import SafetensorsFile
from checkpoints.source import CheckpointError
from tests.support.tiny import CONFIG, tensors, write_checkpoint, write_gguf


def test_reads_whole_and_part(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(24, dtype=np.float32).reshape(4, 6),
        "b": np.arange(6).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3, np.float16),
        "empty": np.zeros((0, 3), np.int64),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name, (slice(None),) * array.ndim), array)
    np.testing.assert_array_equal(file.read("a", (slice(1, 3), slice(2, 5))), arrays["a"][1:3, 2:5])
    file.close()


def header(tensors: Any, data: bytes = b"\0" * 16) -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 1000) + b"{}",
        header(b"not json"),
        header(b"\xff\xff\xff"),
        header(b"[" * 50_000),
        header([]),
        header({"a": {**GOOD, "dtype": "F31"}}),
        header({"a": {**GOOD, "shape": [5]}}),
        header({"a": {**GOOD, "shape": [-4]}}),
        header({"a": {**GOOD, "shape": [2**62, 2**62]}}),
        header({"a": {**GOOD, "data_offsets": [16, 0]}}),
        header({"a": {**GOOD, "data_offsets": [-16, 0]}}),
        header({"a": {**GOOD, "data_offsets": [8, 24]}}),
        header({"a": GOOD, "b": GOOD}),
        header({"a": {"dtype": "F32"}}),
    ],
    ids=range(17),
)
def test_hostile_headers_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin are pickle files"):
        HuggingFaceCheckpoint(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "missing.safetensors", "x.bin", "a/b.safetensors"])
def test_an_index_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "x.bin")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError):
        HuggingFaceCheckpoint(tmp_path)


QUANTS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_tensors_are_the_ones_that_were_written(tmp_path: Path, quant: str) -> None:
    arrays = write_gguf(tmp_path / "x.gguf", quant)
    file = GGUFCheckpoint(tmp_path / "x.gguf")
    assert file.shapes == {name: array.shape for name, array in arrays.items()}
    bits = {"F32": 24, "F16": 11, "BF16": 8, "Q8_0": 7, "Q5_0": 4, "Q5_1": 4, "Q4_0": 3, "Q4_1": 3}[quant]
    for name, array in arrays.items():
        got = file.read(name, (slice(None),) * array.ndim)
        assert np.abs(got - array).max() <= np.abs(array).max() * 2.0**-bits, name
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        whole = file.read(name, (slice(None),))
        for rows in (slice(3, 7), slice(8, 16), slice(11, 30)):
            np.testing.assert_array_equal(file.read(name, (rows,)), whole[rows])
    part = file.read("lm_head.weight", (slice(3, 7), slice(10, 20)))
    np.testing.assert_array_equal(part, file.read("lm_head.weight", (slice(None), slice(None)))[3:7, 10:20])


@pytest.mark.parametrize("quant", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_gguf_k_quants_can_be_read(quant: str) -> None:
    """The gguf package cannot write these formats, so blocks of zero bits are decoded instead."""
    kind = GGMLQuantizationType[quant]
    size, width = gguf.GGML_QUANT_SIZES[kind]
    values = gguf.quants.dequantize(np.zeros((2, width), np.uint8), kind)
    assert values.shape == (2, size)
    assert np.isfinite(values).all()


def test_gguf_config_equals_the_original(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf")
    config = GGUFCheckpoint(tmp_path / "x.gguf").config
    for key in ("architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads",
                "rms_norm_eps", "tie_word_embeddings", "bos_token_id"):  # fmt: skip
        assert config[key] == CONFIG[key], key
    assert config["eos_token_id"] == [CONFIG["eos_token_id"]]
    assert config["rope_parameters"]["rope_theta"] == CONFIG["rope_theta"]


def test_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        GGUFCheckpoint(tmp_path / "x.gguf")


def test_problems_with_tensors_are_listed_together(tmp_path: Path) -> None:
    from jaxserve.config import EngineConfig
    from jaxserve.engine.builder import build_runner
    from jaxserve.errors import LaunchError

    write_checkpoint(tmp_path)
    arrays = tensors(CONFIG)
    del arrays["model.norm.weight"]
    arrays["stray"] = np.zeros(3, np.float32)
    arrays["lm_head.weight"] = np.zeros((5, 5), np.float32)
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(LaunchError) as caught:
        build_runner(EngineConfig(model_path=str(tmp_path)), lambda items, *_: items)
    for line in ("missing: model.norm.weight", "unknown: stray", "wrong shape: lm_head.weight"):
        assert line in str(caught.value)


def test_scales_of_a_kv_cache_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from jaxserve.config import EngineConfig
    from jaxserve.engine.builder import build_runner

    write_checkpoint(tmp_path)
    arrays = tensors(CONFIG)
    arrays |= {f"model.layers.0.self_attn.{name}": np.ones((), np.float32) for name in ("k_scale", "v_scale")}
    save_file(arrays, tmp_path / "model.safetensors")
    with caplog.at_level("INFO"):
        build_runner(EngineConfig(model_path=str(tmp_path), quantization="int8"), lambda items, *_: items)
    assert "scales for an FP8 KV cache are not used" in caplog.text
