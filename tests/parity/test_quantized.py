"""A quantised checkpoint gives the logits of its dequantised weights, in every format and on several devices.

Each format's tensors are written here as its authors define them, next to the dequantised values.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import orbax_io
from jaxserve.errors import LaunchError
from tests.parity.test_golden import GOLDEN, close, load, row, run
from tests.support.marks import slow

GROUP = 8
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])


class Quantized(NamedTuple):
    """The tensors that a file stores for a matrix [O, I], by the suffix of their names, and the dequantised matrix."""

    tensors: dict[str, np.ndarray]
    plain: np.ndarray


def groups(w: np.ndarray) -> np.ndarray:
    return w.reshape(len(w), -1, GROUP)


def words(code: np.ndarray) -> np.ndarray:
    """Pack 4-bit codes along the last axis into 32-bit words, lowest bits first."""
    parts = code.reshape(*code.shape[:-1], -1, 8).astype(np.uint32)
    return np.bitwise_or.reduce(parts << (4 * np.arange(8, dtype=np.uint32)), axis=-1).view(np.int32)


def packed(w: np.ndarray) -> Quantized:
    """Quantise as compressed-tensors does: signed 4-bit integers, stored with 8 added."""
    scale = (np.abs(groups(w)).max(-1) / 7).astype(np.float32)
    code = np.clip(np.rint(groups(w) / scale[..., None]), -8, 7)
    plain = (code * scale[..., None]).reshape(w.shape)
    shape = np.int64(w.shape)
    stored = {"weight_packed": words((code + 8).reshape(w.shape)), "weight_scale": scale, "weight_shape": shape}
    return Quantized(stored, plain)


def with_zeros(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return codes [O, I], zero points and scales [O, I / group], and the dequantised matrix."""
    low, high = groups(w).min(-1), groups(w).max(-1)
    scale = ((high - low) / 15).astype(np.float16)
    zero = np.clip(np.rint(-low / scale.astype(np.float32)), 1, 15)
    code = np.clip(np.rint(groups(w) / scale[..., None].astype(np.float32)) + zero[..., None], 0, 15)
    plain = (code - zero[..., None]) * scale[..., None].astype(np.float32)
    return code.reshape(w.shape), zero, scale, plain.reshape(w.shape).astype(np.float32)


def gptq(w: np.ndarray) -> Quantized:
    code, zero, scale, plain = with_zeros(w)
    stored = {
        "qweight": words(code).T,
        "qzeros": words(zero.T - 1),
        "scales": scale.T,
        "g_idx": np.arange(w.shape[1], dtype=np.int32) // GROUP,
    }
    return Quantized(stored, plain)


def awq(w: np.ndarray) -> Quantized:
    code, zero, scale, plain = with_zeros(w)

    def shuffled(x: np.ndarray) -> np.ndarray:
        return words(x.reshape(len(x), -1, 8)[..., list(AWQ_ORDER)].reshape(x.shape))

    return Quantized({"qweight": shuffled(code.T), "qzeros": shuffled(zero.T), "scales": scale.T}, plain)


def channels(dtype: Any, largest: float) -> Callable[[np.ndarray], Quantized]:
    def quantize(w: np.ndarray) -> Quantized:
        scale = (np.abs(w).max(-1, keepdims=True) / largest).astype(np.float32)
        stored = (np.rint(w / scale) if dtype == np.int8 else w / scale).astype(dtype)
        return Quantized({"weight": stored, "weight_scale": scale}, stored.astype(np.float32) * scale)

    return quantize


def mxfp4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a matrix [..., I] as blocks [..., I / 32, 16], their exponents, and the dequantised matrix."""
    blocks = w.reshape(*w.shape[:-1], -1, 32)
    exponent = np.floor(np.log2(np.abs(blocks).max(-1))).astype(np.int32) - 2
    scale = np.exp2(exponent)[..., None].astype(np.float32)
    magnitude = np.abs(np.abs(blocks)[..., None] / scale[..., None] - E2M1).argmin(-1)
    code = (magnitude + 8 * (blocks < 0)).astype(np.uint8)
    plain = np.where(blocks < 0, -1, 1) * E2M1[magnitude] * scale
    return code[..., ::2] | code[..., 1::2] << 4, (exponent + 127).astype(np.uint8), plain.reshape(w.shape)


def compressed(kind: str, bits: int, type: str, strategy: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": type, "symmetric": True, "strategy": strategy, "dynamic": False}
    weights |= {"group_size": GROUP} if strategy == "group" else {}
    group = {"targets": ["Linear"], "weights": weights}
    ignore = ["lm_head", r"re:.*mlp\.gate$"]
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}, "ignore": ignore}


FORMATS: dict[str, tuple[Callable[[np.ndarray], Quantized], dict[str, Any]]] = {
    "int4": (packed, compressed("pack-quantized", 4, "int", "group")),
    "int8": (channels(np.int8, 127), compressed("int-quantized", 8, "int", "channel")),
    "fp8": (channels(ml_dtypes.float8_e4m3fn, 448), compressed("float-quantized", 8, "float", "channel")),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
}


def write(folder: Path, source: str, tensors: dict[str, np.ndarray], **changes: Any) -> Path:
    folder.mkdir()
    config = json.loads((GOLDEN / source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    shutil.copy(GOLDEN / source / "golden.npz", folder)
    return folder


def linear_maps(tensors: dict[str, np.ndarray]) -> Iterator[str]:
    return (name for name in list(tensors) if name.endswith("_proj.weight"))


def logits(folder: Path, **changes: Any) -> np.ndarray:
    model = load(str(folder), **changes)
    return run(model, [row(i, ids, 0, 60) for i, ids in enumerate(model.token_ids)])


ONE, TWO_GROUPS, SPLIT = {}, {"tp_size": 2, "ep_size": 2}, {"tp_size": 4}


@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("int4", [ONE, TWO_GROUPS]),
        ("int8", [SPLIT]),  # no quantisation group spans devices
        ("fp8", [ONE]),
        ("gptq", [ONE]),
        ("awq", [ONE]),
        *(slow(name, [ONE, TWO_GROUPS]) for name in ("int8", "fp8", "gptq", "awq")),
        slow("fp8", [SPLIT]),
    ],
)
def test_dense_layers_and_experts(name: str, meshes: list[dict[str, int]], tmp_path: Path) -> None:
    quantize, settings = FORMATS[name]
    plain = load_file(GOLDEN / "qwen3_moe" / "model.safetensors")
    stored = dict(plain)
    for tensor in linear_maps(plain):
        module = tensor.removesuffix(".weight")
        quantized = quantize(stored.pop(tensor))
        stored |= {f"{module}.{kind}": values for kind, values in quantized.tensors.items()}
        plain[tensor] = quantized.plain.astype(np.float32)
    folder = write(tmp_path / "quantised", "qwen3_moe", stored, quantization_config=settings)
    want = logits(write(tmp_path / "plain", "qwen3_moe", plain))
    for mesh in meshes:
        close(logits(folder, **mesh), want)


def save_as_orbax(folder: Path, destination: Path) -> Path:
    model = load(str(folder))
    shutil.copytree(folder, destination, ignore=shutil.ignore_patterns("*.safetensors"))
    manifest = orbax_io.Manifest(architecture="any", dtype="float32", source=str(folder))
    orbax_io.save(destination, model.runner._weights, manifest)
    return destination


def groups_of_32(w: np.ndarray) -> Quantized:
    """Quantise to signed 4-bit integers with bfloat16 scales; the last group of a row may be shorter."""
    plain = np.empty_like(w)
    for start in range(0, w.shape[1], 32):
        part = w[:, start : start + 32]
        scale = (np.abs(part).max(1, keepdims=True) / 7).astype(ml_dtypes.bfloat16).astype(np.float32)
        plain[:, start : start + 32] = np.rint(part / scale) * scale
    return Quantized({}, plain)


REQUESTED = {
    "int8": channels(np.int8, 127),
    "fp8": channels(ml_dtypes.float8_e4m3fn, 448),
    "int4": groups_of_32,
}


@pytest.mark.parametrize(
    ("name", "mesh"), [("int4", ONE), ("int8", SPLIT), slow("fp8", ONE), slow("int8", ONE), slow("fp8", SPLIT)]
)
def test_quantised_while_loading(name: str, mesh: dict[str, int], tmp_path: Path) -> None:
    plain = load_file(GOLDEN / "qwen3_moe" / "model.safetensors")
    for tensor in linear_maps(plain):
        plain[tensor] = REQUESTED[name](plain[tensor]).plain.astype(np.float32)
    want = logits(write(tmp_path / "plain", "qwen3_moe", plain))
    close(logits(GOLDEN / "qwen3_moe", quantization=name, **mesh), want)


def test_what_cannot_be_quantised_is_refused(gpt_oss: tuple[Path, Path]) -> None:
    quantised, plain = gpt_oss
    load(str(quantised), quantization="mxfp4")
    with pytest.raises(LaunchError, match="--quantization int8: the checkpoint is already quantised as mxfp4"):
        load(str(quantised), quantization="int8")
    with pytest.raises(LaunchError, match="--quantization awq: the checkpoint is not in this format"):
        load(str(plain), quantization="awq")
    with pytest.raises(LaunchError, match="down_proj has inputs and outputs the other way"):
        load(str(plain), quantization="int8")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model with experts in MXFP4, as published, and in float32, as transformers would write them."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("gpt_oss")
    plain = load_file(GOLDEN / "gpt_oss" / "model.safetensors")
    stored = dict(plain)
    size, inner = 32, 32
    for name in list(plain):
        prefix, _, tensor = name.rpartition(".")
        if tensor not in ("gate_up_proj", "down_proj"):
            if tensor == "gate_up_proj_bias":
                plain[name] = stored[name] = rng.standard_normal((4, 2 * inner)).astype(np.float32)
            continue
        outputs, inputs = (2 * inner, size) if tensor == "gate_up_proj" else (size, inner)
        blocks, scales, w_EOI = mxfp4(rng.standard_normal((4, outputs, inputs)).astype(np.float32) / 6)
        del stored[name]
        stored |= {f"{prefix}.{tensor}_blocks": blocks, f"{prefix}.{tensor}_scales": scales}
        plain[name] = w_EOI.swapaxes(1, 2).astype(np.float32)
    settings = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    quantised = write(folder / "mxfp4", "gpt_oss", stored, intermediate_size=inner, quantization_config=settings)
    return quantised, write(folder / "plain", "gpt_oss", plain, intermediate_size=inner)


def test_gpt_oss_as_published(gpt_oss: tuple[Path, Path], tmp_path: Path) -> None:
    quantised, plain = gpt_oss
    want = logits(plain)
    close(logits(quantised), want)
    close(logits(quantised, tp_size=4, ep_size=4), want)
    saved = save_as_orbax(quantised, tmp_path / "orbax")
    close(logits(saved, tp_size=2, ep_size=2), want)


def test_bytes_on_the_device_are_those_of_the_file(gpt_oss: tuple[Path, Path]) -> None:
    file = load_file(gpt_oss[0] / "model.safetensors")
    weights = load(str(gpt_oss[0])).runner._weights
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) == sum(tensor.nbytes for tensor in file.values())


def test_what_does_not_fit_is_refused(gpt_oss: tuple[Path, Path], tmp_path: Path) -> None:
    """Blocks that do not divide over two devices, scales of another dtype, and missing tensors are refused."""
    with pytest.raises(LaunchError, match="32 elements in blocks of 32 do not divide over 2 devices; try another --tp"):
        load(str(gpt_oss[0]), tp_size=2)
    folder = shutil.copytree(gpt_oss[0], tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    scales = next(name for name in tensors if name.endswith("_scales"))
    save_file(tensors | {scales: tensors[scales].astype(np.float32)}, folder / "model.safetensors")
    with pytest.raises(LaunchError, match="is float32, the config says that it is uint8"):
        load(str(folder))
    del tensors[scales]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LaunchError, match=r"missing: model.layers.0.mlp.experts.\w+_scale"):
        load(str(folder))
