"""Reads Hugging Face's `config.json`. Host-only: does not import jax."""

import functools
import math
from collections.abc import Callable, Container, Mapping
from typing import Any, Literal, ParamSpec

import msgspec

from jaxserve.config import Activation, Dtype, LayerConfig, ModelConfig, MoeConfig, RopeConfig
from jaxserve.errors import LaunchError
from jaxserve.models.hf.quantization import read_quantization

P = ParamSpec("P")

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_DTYPES: dict[str, Dtype] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
_MAX_LAYERS = 1024
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_UNSUPPORTED_KEYS = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
_REFUSED_KEYS = ("trust_remote_code", "_attn_implementation_internal")


def refuse_bad_fields(read: Callable[P, ModelConfig]) -> Callable[P, ModelConfig]:
    """Make a reader of `config.json` raise LaunchError for fields that are missing or of the wrong type."""

    @functools.wraps(read)
    def checked(*args: P.args, **kwargs: P.kwargs) -> ModelConfig:
        try:
            return read(*args, **kwargs)
        except LaunchError:
            raise
        except KeyError as error:
            raise LaunchError(f"config.json: {error.args[0]} is missing") from None
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise LaunchError(f"config.json: {error}") from None

    return checked


def read_rope(config: Mapping[str, Any], max_position: int) -> RopeConfig:
    """Read the rotary embedding settings of a `config.json`.

    Raises:
        LaunchError: the RoPE variant is not supported.
    """
    # transformers 5 writes `rope_parameters`; older files have `rope_theta` next to `rope_scaling`.
    scaling: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if "long_factor" in scaling:  # whatever type the file names
        kind = "longrope"
    if kind not in _ROPE_TYPES:
        raise LaunchError(f"config.json: rope scaling {kind!r} is not supported; supported: {', '.join(_ROPE_TYPES)}")
    if (partial := scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        raise LaunchError(f"config.json: partial_rotary_factor {partial} is not supported by this architecture")
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        factor = float(scaling.get("factor", 1.0))
        attention_factor = mscale(factor, float(scaling["mscale"])) / mscale(factor, float(scaling["mscale_all_dim"]))
    return RopeConfig(
        theta=float(scaling.get("rope_theta", config.get("rope_theta", 10_000.0))),
        scaling=kind,
        factor=float(scaling.get("factor") or 1.0),
        original_max_position=int(
            scaling.get("original_max_position_embeddings")
            or config.get("original_max_position_embeddings")
            or max_position
        ),
        low_freq_factor=float(scaling.get("low_freq_factor") or 1.0),
        high_freq_factor=float(scaling.get("high_freq_factor") or 4.0),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        attention_factor=None if attention_factor is None else float(attention_factor),
        truncate=bool(scaling.get("truncate", True)),
        frequency_divisors=tuple(scaling["frequency_divisors"]) if "frequency_divisors" in scaling else None,
    )


def mscale(factor: float, weight: float) -> float:
    """Return YaRN's attention multiplier for a stretched context (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 or not weight else 0.1 * weight * math.log(factor) + 1.0


def _read_layers(config: Mapping[str, Any], num_layers: int) -> tuple[LayerConfig, ...]:
    window = config.get("sliding_window") if config.get("use_sliding_window") is not False else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(config.get("max_window_layers") or 0)
        kinds = ["full_attention"] * min(first, num_layers) + ["sliding_attention"] * (num_layers - first)
    if len(kinds) != num_layers:
        raise LaunchError(f"config.json: {len(kinds)} layer_types for {num_layers} layers")
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise LaunchError(f"config.json: layers of {unknown[0]} are not supported")
    return tuple(LayerConfig(window=int(window) if window and kind == "sliding_attention" else None) for kind in kinds)


def read_num_layers(config: Mapping[str, Any]) -> int:
    """Read the number of layers.

    Raises:
        LaunchError: it is not between 1 and `_MAX_LAYERS`.
    """
    num_layers = int(config["num_hidden_layers"])
    if not 0 < num_layers <= _MAX_LAYERS:
        raise LaunchError(f"config.json: num_hidden_layers must be 1 to {_MAX_LAYERS}, got {num_layers}")
    return num_layers


def with_experts(model: ModelConfig, experts: MoeConfig, dense_layers: Container[int] = ()) -> ModelConfig:
    """Return the model with experts in all layers except `dense_layers`."""
    layers = tuple(
        layer if number in dense_layers else msgspec.structs.replace(layer, mlp="experts")
        for number, layer in enumerate(model.layers)
    )
    return msgspec.structs.replace(model, layers=layers, moe=experts)


@refuse_bad_fields
def read_dense_config(
    config: Mapping[str, Any],
    *,
    attention_bias: bool | None = None,
    attention_out_bias: bool | None = None,
    qk_norm: Literal["head", "projection"] | None = None,
) -> ModelConfig:
    """Read a Hugging Face `config.json`.

    Args:
        config: the parsed file.
        attention_bias: whether q, k and v have a bias; None reads `attention_bias`.
        attention_out_bias: the same for the output projection.
        qk_norm: how queries and keys are normalised; see `ModelConfig`.

    Raises:
        LaunchError: a field is missing, out of range, or requests a feature that the dense decoder lacks.
    """
    for key in _REFUSED_KEYS:
        if config.get(key):
            raise LaunchError(f"config.json: {key} would run code from the checkpoint, which is not allowed")
    # Phi 3, DeepSeek and Kimi name Python files beside weights that are computed here: they are not opened.
    if "--" in str(config.get("auto_map")):
        raise LaunchError("config.json: auto_map refers to code in another repository, which is not allowed")
    architectures = config.get("architectures") or []
    if len(architectures) != 1:
        raise LaunchError(f"config.json: expected one entry in 'architectures', got {architectures!r}")
    architecture = str(architectures[0])
    activation = str(config.get("hidden_act") or config.get("hidden_activation") or "silu")
    if activation not in _ACTIVATIONS:
        raise LaunchError(
            f"config.json: activation {activation!r} is not supported; supported: {', '.join(sorted(_ACTIVATIONS))}"
        )
    for key in _UNSUPPORTED_KEYS:
        if config.get(key):
            raise LaunchError(f"config.json: {key} is not supported")
    num_q_heads = int(config["num_attention_heads"])
    max_position = int(config["max_position_embeddings"])
    num_layers = read_num_layers(config)
    eos = config.get("eos_token_id")
    declared_bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        layers=_read_layers(config, num_layers),
        num_q_heads=num_q_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_q_heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // num_q_heads),
        max_position=max_position,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=read_rope(config, max_position),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=declared_bias if attention_bias is None else attention_bias,
        attention_out_bias=declared_bias if attention_out_bias is None else attention_out_bias,
        activation=_ACTIVATIONS[activation],
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=qk_norm,
        quantization=read_quantization(config),
        dtype=_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype") or "float32"), "float32"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
    )
