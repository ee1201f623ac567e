"""Reads the `quantization_config` of a `config.json`. Host-only: does not import jax."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import regex

from jaxserve.config import ModelConfig, QuantizationConfig, QuantizedPart
from jaxserve.errors import LaunchError
from jaxserve.models.hf.supported import check_supported
from jaxserve.models.hf.tensor_name import TensorName

# Block size of the Microscaling formats (OCP MX specification 1.0).
_MX_COLUMNS = 32
_WHOLE_ROW = 0
# Timeout of a pattern: patterns come with the model and may never finish.
_MATCH_S = 1.0


def read_quantization(config: Mapping[str, Any]) -> QuantizationConfig | None:
    """Read the format of quantised weights, if any; see `with_quantized_parts` for which are quantised.

    Raises:
        LaunchError: the format is not supported.
    """
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return None
    method = str(quantization.get("quant_method", "unknown"))
    if method not in _METHODS:
        raise LaunchError(
            f"config.json: quantised checkpoints ({method}) are not supported; supported: {', '.join(sorted(_METHODS))}"
        )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return _METHODS[method](quantization, dtype)


def with_requested(config: ModelConfig, hf_config: Mapping[str, Any], requested: str | None) -> ModelConfig:
    """Return the model as requested by `--quantization`: quantised during loading, or as in its checkpoint.

    Raises:
        LaunchError: the checkpoint has another format, or `requested` is a format that only checkpoints can have.
    """
    if requested is None:
        return config
    method = (hf_config.get("quantization_config") or {}).get("quant_method")
    if requested == method:
        return config
    if config.quantization is not None:
        raise LaunchError(f"--quantization {requested}: the checkpoint is already quantised as {method}")
    if requested not in REQUESTED:
        raise LaunchError(f"--quantization {requested}: the checkpoint is not in this format")
    return msgspec.structs.replace(config, quantization=REQUESTED[requested])


def with_quantized_parts(config: ModelConfig, names: Mapping[tuple[str, ...], TensorName]) -> ModelConfig:
    """Return the model with `parts` reduced to the parts whose modules are quantised.

    Args:
        config: config of the model.
        names: path in the tree -> tensor of the checkpoint.

    Raises:
        LaunchError: a part is quantised only in some layers, or only in some of its modules.
    """
    if config.quantization is None:
        return config
    parts: list[QuantizedPart] = []
    for part in config.quantization.parts:
        unquantized = {name: _is_unquantized(config.quantization, name) for name in _modules(config, names, part)}
        if any(unquantized.values()) and not all(unquantized.values()):
            named = next(name for name, is_unquantized in unquantized.items() if is_unquantized)
            raise LaunchError(
                f"config.json: {named} is not quantised, but other modules of its kind are, which is not supported"
            )
        if unquantized and not all(unquantized.values()):
            parts.append(part)
    quantization = msgspec.structs.replace(config.quantization, parts=tuple(parts))
    return msgspec.structs.replace(config, quantization=quantization if parts else None)


def _modules(config: ModelConfig, names: Mapping[tuple[str, ...], TensorName], part: QuantizedPart) -> Iterable[str]:
    """Yield checkpoint names of a part's linear modules; for experts, those of the first and the last expert."""
    kind = {"mlp": "dense", "experts": "experts", "shared_expert": "experts"}.get(part)
    prefix = ("layers", "moe", part) if kind == "experts" else ("layers", part)
    last = 0 if config.moe is None else config.moe.num_experts - 1
    for path, name in names.items():
        if path[: len(prefix)] != prefix or path[-1] != "weight" or path[-2].endswith("norm"):
            continue
        for number, layer in enumerate(config.layers):
            if kind in (None, layer.mlp):
                for expert in (0, last):
                    yield name.of_layer(number, expert).removesuffix(".weight")


def _is_unquantized(quantization: QuantizationConfig, name: str) -> bool:
    return any(_matches(entry, name) for entry in quantization.unquantized_modules)


def _matches(entry: str, name: str) -> bool:
    """Return whether an entry of the list of unquantised modules matches `name`.

    An entry is `re:` and a regular expression that matches the name's start, or consecutive components of the dotted
    name, where `*` matches any.
    """
    if entry.startswith("re:"):
        try:
            return regex.match(entry[3:], name, timeout=_MATCH_S) is not None
        except (regex.error, TimeoutError) as error:
            raise LaunchError(f"config.json: modules that are not quantised: {entry[:200]!r}: {error}") from None
    wanted, parts = entry.split("."), name.split(".")
    return any(
        all(want in ("*", part) for want, part in zip(wanted, parts[start:], strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def _fp8(config: Mapping[str, Any], _: str) -> QuantizationConfig:
    """Read the FP8 format of DeepSeek and Qwen."""
    block = config.get("weight_block_size")
    if block is None or len(block) != 2:
        raise LaunchError(f"config.json: fp8 weights need a weight_block_size of two numbers, got {block}")
    rows, columns = (_positive(size, "weight_block_size") for size in block)
    check_supported(config, "fp8", fmt=("e4m3",), activation_scheme=("dynamic",))
    return QuantizationConfig(
        element_type="fp8",
        block=(rows, columns),
        unquantized_modules=_unquantized_modules(config),
        activations="quantized",
    )


def _mxfp4(config: Mapping[str, Any], _: str) -> QuantizationConfig:
    """Read gpt-oss's format, in which only experts are quantised (OCP Microscaling Formats 1.0)."""
    return QuantizationConfig(
        element_type="mxfp4",
        block=(1, _MX_COLUMNS),
        scale_dtype="e8m0",
        parts=("experts",),
        unquantized_modules=_unquantized_modules(config),
    )


def _compressed_tensors(config: Mapping[str, Any], dtype: str) -> QuantizationConfig:
    """Read the format of llm-compressor and Kimi K2 Thinking."""
    groups: Mapping[str, Any] = config.get("config_groups") or {}
    if len(groups) != 1:
        raise LaunchError(
            f"config.json: compressed-tensors needs exactly one entry in config_groups, got {len(groups)}"
        )
    group: Mapping[str, Any] = next(iter(groups.values()))
    check_supported(group, "compressed-tensors", targets=(["Linear"],))
    weights: Mapping[str, Any] = group.get("weights") or {}
    kind = str(group.get("format") or config.get("format"))
    found = (kind, weights.get("type"), weights.get("num_bits"))
    if found not in _COMPRESSED:
        supported = "; ".join(f"{format} of {bits}-bit {type}" for format, type, bits in _COMPRESSED)
        raise LaunchError(
            f"config.json: compressed-tensors {found[0]} of {found[2]}-bit {found[1]} is not supported; supported: "
            f"{supported}"
        )
    check_supported(
        weights, "compressed-tensors", symmetric=(True,), dynamic=(False,), actorder=(None, "weight", "static")
    )
    for key in ("input_activations", "output_activations"):
        if group.get(key) and not group[key].get("dynamic", False):
            raise LaunchError(f"config.json: compressed-tensors with static {key} is not supported")
    element_type, strategies = _COMPRESSED[found]
    strategy = weights.get("strategy")
    if strategy not in strategies:
        raise LaunchError(
            f"config.json: {kind} weights by {strategy} are not supported; supported: by {', '.join(strategies)}"
        )
    columns = _WHOLE_ROW if strategy == "channel" else _positive(weights.get("group_size"), "group_size")
    return QuantizationConfig(
        element_type=element_type,
        block=(1, columns),
        # TPUs have no float16, so float16 scales become float32.
        scale_dtype="bfloat16" if element_type == "int4" and dtype == "bfloat16" else "float32",
        unquantized_modules=_strings(config.get("ignore"), "ignore"),
        activations="quantized" if columns == _WHOLE_ROW and group.get("input_activations") else "exact",
    )


def _awq(config: Mapping[str, Any], _: str) -> QuantizationConfig:
    """Read AutoAWQ's format (arXiv:2306.00978)."""
    check_supported(config, "awq", bits=(4,), version=("gemm", "GEMM"), zero_point=(True,))
    columns = _positive(config.get("group_size"), "group_size")
    return QuantizationConfig(
        element_type="int4", block=(1, columns), zeros=True, unquantized_modules=_unquantized_modules(config)
    )


def _gptq(config: Mapping[str, Any], _: str) -> QuantizationConfig:
    """Read GPTQ's format (arXiv:2210.17323), as written by AutoGPTQ and GPTQModel."""
    check_supported(config, "gptq", bits=(4,), desc_act=(False,), checkpoint_format=("gptq",))
    columns = _positive(config.get("group_size"), "group_size")
    if config.get("dynamic"):
        raise LaunchError("config.json: gptq with per-module settings (dynamic) is not supported")
    return QuantizationConfig(
        element_type="int4", block=(1, columns), zeros=True, unquantized_modules=_unquantized_modules(config)
    )


def _positive(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise LaunchError(f"config.json: {key} of quantised weights must be a positive number, got {value!r}")
    return value


def _unquantized_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    return _strings(config.get("modules_to_not_convert"), "modules_to_not_convert")


def _strings(value: Any, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise LaunchError(f"config.json: {key} must be a list of names")
    return tuple(value)


# Formats to which weights can be quantised during loading.
REQUESTED: Mapping[str, QuantizationConfig] = {
    "int8": QuantizationConfig(element_type="int8", block=(1, _WHOLE_ROW)),
    "fp8": QuantizationConfig(element_type="fp8", block=(1, _WHOLE_ROW)),
    "int4": QuantizationConfig(element_type="int4", block=(1, 32), scale_dtype="bfloat16"),
    "w8a8_int8": QuantizationConfig(element_type="int8", block=(1, _WHOLE_ROW), activations="requested"),
    "w8a8_fp8": QuantizationConfig(element_type="fp8", block=(1, _WHOLE_ROW), activations="requested"),
}
# (format, type, bits) -> element type, and strategies of sharing scales.
_COMPRESSED: Mapping[tuple[Any, Any, Any], tuple[Any, tuple[str, ...]]] = {
    ("pack-quantized", "int", 4): ("int4", ("group", "channel")),
    ("int-quantized", "int", 8): ("int8", ("channel",)),
    ("float-quantized", "float", 8): ("fp8", ("channel",)),
}
_METHODS: Mapping[str, Callable[[Mapping[str, Any], str], QuantizationConfig]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}
