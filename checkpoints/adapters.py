"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

An adapter that needs an unsupported feature is rejected with an error that names it. Pickle files are never opened.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from checkpoints.huggingface import read_json
from checkpoints.safetensors_file import SafetensorsFile
from checkpoints.source import CheckpointError, listed

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# lora_A is [r, in], lora_B [out, r]; for an embedding, lora_embedding_A is [r, ids] and lora_embedding_B [out, r].
_TENSOR_NAME = re.compile(
    r"(?P<module>.+?)(?P<inner>(?:\.base_layer)*)\.lora_(?P<embedding>embedding_)?(?P<matrix>[AB])(?:\.weight)?"
)
# Experts are parameters of one module, in this order. PEFT wraps the module once per adapted parameter, the first one
# first: the first parameter is the innermost, and the last one has the module's name.
_EXPERTS, _EXPERT_PARAMETERS = "experts", ("gate_up_proj", "down_proj")


class _PeftConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `adapter_config.json` that affect the computation; the others concern training."""

    peft_type: str = ""
    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    base_model_name_or_path: str | None = None
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    layer_replication: list[Any] | None = None
    trainable_token_indices: Any = None
    target_parameters: list[str] | None = None
    alora_invocation_tokens: list[int] | None = None
    arrow_config: Any = None
    use_qalora: bool = False
    use_bdlora: Any = None


# Field -> the reason why an adapter that sets it is rejected.
_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA is not supported: it rescales columns of the base weights",
    "modules_to_save": "fully trained modules are not supported; merge them into the base model",
    "lora_bias": "LoRA biases are not supported",
    "fan_in_fan_out": "transposed base weights are not supported",
    "layer_replication": "layer replication is not supported",
    "trainable_token_indices": "tokens trained whole are not supported; merge them into the base model",
    "alora_invocation_tokens": "adapters that start in the middle of a prompt are not supported",
    "arrow_config": "routing among adapters is not supported",
    "use_qalora": "QA-LoRA pools its inputs, which is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
}


class AdapterTensors(NamedTuple):
    """The LoRA A and B matrices of one module: delta W = scale * B A.

    Attributes:
        a_RI: A [r, in]; for an embedding [r, out]; for a parameter with all experts [E, r, in].
        b_OR: B [out, r]; for an embedding [ids, r], so that delta W has the shape of the weight there, too; for a
            parameter with all experts [E, out, r].
        scale: alpha / r, or alpha / sqrt(r) (rank-stabilised, arXiv:2312.03732).
    """

    a_RI: np.ndarray
    b_OR: np.ndarray
    scale: float


class PeftAdapter(NamedTuple):
    """An adapter in host memory.

    Attributes:
        base_model: name of the base model, as the adapter's author wrote it.
        modules: LoRA matrices by Hugging Face module name, such as `model.layers.0.self_attn.q_proj`, or by name of a
            parameter with all experts, such as `model.layers.0.mlp.experts.down_proj`.
    """

    base_model: str | None
    modules: dict[str, AdapterTensors]

    @property
    def rank(self) -> int:
        """The largest rank of the modules."""
        return max(tensors.a_RI.shape[-2] for tensors in self.modules.values())


def of_all_experts(name: str) -> bool:
    """Return whether a parameter contains all experts of a layer."""
    module, _, parameter = name.rpartition(".")
    return parameter in _EXPERT_PARAMETERS and module.endswith(f".{_EXPERTS}")


def read_peft(folder: Path) -> PeftAdapter:
    """Read an adapter folder.

    Raises:
        CheckpointError: files are missing or broken, values are not finite, or the adapter needs an unsupported
            feature.
    """
    config = _read_config(folder / _CONFIG)
    pairs, problems = _by_parameter(_read_pairs(folder), config.target_parameters or [])
    modules: dict[str, AdapterTensors] = {}
    for module, pair in sorted(pairs.items()):
        if isinstance(found := _tensors(config, module, pair), str):
            problems.append(f"{module}: {found}")
        else:
            modules[module] = found
    if problems:
        raise CheckpointError(f"{folder}: {listed(problems)}")
    if not modules:
        raise CheckpointError(f"{folder / _TENSORS}: no module is adapted")
    return PeftAdapter(config.base_model_name_or_path, modules)


def _read_config(path: Path) -> _PeftConfig:
    try:
        config = msgspec.convert(read_json(path), _PeftConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if config.peft_type != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.peft_type!r}; only LORA is supported")
    for field, reason in _REFUSED.items():
        if value := getattr(config, field):
            raise CheckpointError(f"{path}: {field} is {value!r}: {reason}")
    if config.bias != "none":
        raise CheckpointError(f"{path}: bias is {config.bias!r}: trained biases are not supported")
    ranks = [config.r, *config.rank_pattern.values()]
    if min(ranks) < 1:
        raise CheckpointError(f"{path}: ranks must be at least 1, got {min(ranks)}")
    alphas = [config.lora_alpha, *config.alpha_pattern.values()]
    if not all(map(math.isfinite, alphas)):
        raise CheckpointError(f"{path}: lora_alpha must be finite")
    return config


class _Pair(msgspec.Struct):
    """The LoRA A and B matrices of one module as stored in the file."""

    embedding: bool
    a: np.ndarray | None = None
    b: np.ndarray | None = None


def _by_parameter(pairs: dict[tuple[str, int], _Pair], targets: Sequence[str]) -> tuple[dict[str, _Pair], list[str]]:
    """Return the pairs by module or parameter name, and the problems found.

    Args:
        pairs: pairs by module name and wrapping depth.
        targets: `target_parameters`: names of parameters, or the ends of names.
    """
    named: dict[str, _Pair] = {}
    problems: list[str] = []
    modules: dict[str, dict[int, _Pair]] = {}
    for (module, depth), pair in pairs.items():
        modules.setdefault(module, {})[depth] = pair
    for module, by_depth in modules.items():
        parameters = [f"{module}.{name}" for name in _EXPERT_PARAMETERS]
        names = [module]
        if of_all_experts(parameters[0]):
            names = [name for name in parameters if any(f".{name}".endswith(f".{target}") for target in targets)]
        if set(by_depth) != set(range(len(names))):
            problems.append(f"{module}: {len(by_depth)} of its parameters are adapted; known are {', '.join(names)}")
            continue
        for depth, name in enumerate(reversed(names)):
            named[name] = by_depth[depth]
    known = [f".{name}{end}" for name in named for end in ("", ".weight")]
    absent = [target for target in targets if not any(name.endswith(f".{target}") for name in known)]
    # A module with a problem makes its targets absent, so absent targets are reported only if there is none.
    problems = problems or [f"target_parameters: there is no LoRA of {target}" for target in absent]
    return named, problems


def _read_pairs(folder: Path) -> dict[tuple[str, int], _Pair]:
    """Read the pairs by module name and wrapping depth."""
    path = folder / _TENSORS
    if not path.is_file():
        pickles = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()]
        hint = f" ({pickles[0]} is a pickle file, which can run code; convert it)" if pickles else ""
        raise CheckpointError(f"{path} does not exist{hint}")
    file = SafetensorsFile(path)
    try:
        pairs: dict[tuple[str, int], _Pair] = {}
        unknown: list[str] = []
        for name, shape in file.shapes.items():
            found = _TENSOR_NAME.fullmatch(name.removeprefix(_PREFIX))
            if found is None or not name.startswith(_PREFIX) or len(shape) != 2:
                unknown.append(name)
                continue
            key = (found["module"], found["inner"].count("."))
            pair = pairs.setdefault(key, _Pair(embedding=found["embedding"] is not None))
            value = file.read(name, (slice(None), slice(None))).astype(np.float32)
            if found["matrix"] == "A":
                pair.a = value
            else:
                pair.b = value
    finally:
        file.close()
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} tensors are not LoRA weights of a module: {listed(unknown, ', ')}"
        )
    return pairs


def _tensors(config: _PeftConfig, module: str, pair: _Pair) -> AdapterTensors | str:
    """Return the LoRA matrices of a module, or a message that describes the problem with them."""
    if pair.a is None or pair.b is None:
        return f"lora_{'B' if pair.b is None else 'A'} is missing"
    rank = _by_pattern(config.rank_pattern, module, config.r)
    num_experts = len(pair.a) // rank if of_all_experts(module) else 1
    if not len(pair.a) == pair.b.shape[1] == rank * num_experts:
        return f"lora_A is {pair.a.shape}, lora_B {pair.b.shape}, the config asks for rank {rank}"
    if not (np.isfinite(pair.a).all() and np.isfinite(pair.b).all()):
        return "values that are not finite"
    alpha = _by_pattern(config.alpha_pattern, module, config.lora_alpha)
    scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    if pair.embedding:
        return AdapterTensors(np.ascontiguousarray(pair.b.T), np.ascontiguousarray(pair.a.T), scale)
    if of_all_experts(module):
        # The rows of A are ordered by expert first, the columns of B by rank first.
        a_ERI = pair.a.reshape(num_experts, rank, -1)
        return AdapterTensors(a_ERI, pair.b.reshape(len(pair.b), rank, num_experts).transpose(2, 0, 1), scale)
    return AdapterTensors(pair.a, pair.b, scale)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the module name or its end.

    PEFT accepts any regular expression. Only names are supported here, with `^` for a full match, because an untrusted
    expression can run forever.
    """
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").removeprefix(r".*\.").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise CheckpointError(f"pattern {pattern!r}: only names of modules are supported")
        if module == name or (module.endswith(f".{name}") and not pattern.startswith("^")):
            return value
    return default
