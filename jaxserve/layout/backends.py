"""Chooses the backend of each op for a model on a mesh, and logs the choice with its reason."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxserve.config import QuantizationConfig
from jaxserve.errors import LaunchError
from jaxserve.layers.context import MAX_EXACT_TOKENS, Activations, Backends
from jaxserve.layers.linear import format_of
from jaxserve.layers.moe import router_config
from jaxserve.layout.device_results import read_results, results_path
from jaxserve.lora.pool import LoraPoolLayout, lora_expert_shapes, lora_modules
from jaxserve.models.decoder import Decoder
from jaxserve.models.param_spec import ParamSpec, Path
from kernels_pallas.dispatch import (
    BackendName,
    Choice,
    choose_attention,
    choose_grouped_matmul,
    choose_head_matmul,
    choose_lora,
    choose_norm,
    choose_rope,
    choose_router,
    choose_sampler,
    multiplies,
)
from kernels_pallas.grouped_matmul.api import ExpertShape, GroupedMatmul
from kernels_pallas.grouped_matmul.xla.backend import XlaGroupedMatmul
from kernels_pallas.grouped_matmul.xla.quantized_rows import has_row_scales
from kernels_pallas.lora_matmul.api import LoraMatmul
from kernels_pallas.lora_matmul.xla.backend import XlaLora
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionConfig

logger = logging.getLogger(__name__)


class ChosenBackends(NamedTuple):
    """The backends, and the modules that use their kernels; the others use portable XLA.

    Attributes:
        backends: the implementation of each op.
        linears: paths of linear modules.
        lora_groups: paths of groups in the LoRA pool.
    """

    backends: Backends
    linears: tuple[Path, ...]
    lora_groups: tuple[Path, ...]


def choose_attention_backend(name: BackendName, config: AttentionConfig, mesh: Mesh) -> Choice[AttentionBackend]:
    """Choose the attention backend; `auto` takes portable XLA if the kernels failed a check of the devices.

    Raises:
        LaunchError: the backend that `--attention-backend` names cannot serve this model on these devices.
    """
    results = read_results(mesh.devices.flat[0].device_kind)
    failed = results.failed.get("paged_attention", [])
    if failed and name == "auto":
        reason = f"device_check found {len(failed)} wrong results of the native kernels, such as: {failed[0]}"
        return choose_attention("xla", config, mesh)._replace(reason=reason, is_fallback=True)
    try:
        choice = choose_attention(name, config, mesh, results.tuning)
    except NotImplementedError as error:
        raise LaunchError(f"--attention-backend {name}: {error}") from None
    notes = [choice.reason]
    if choice.name != "xla":
        notes += [f"although device_check found {len(failed)} wrong results"] * bool(failed)
        notes += [f"with tiles from {results_path(results.device_kind)}"] * bool(results.tiles)
    return choice._replace(reason=", ".join(notes))


def choose_backends(
    decoder: Decoder,
    mesh: Mesh,
    attention: Choice[AttentionBackend],
    lora_pool: LoraPoolLayout | None,
    *,
    exact: bool,
) -> ChosenBackends:
    """Choose a backend for every op except attention, which is given, and log all choices.

    Args:
        decoder: the model.
        mesh: the devices.
        attention: the choice for attention.
        lora_pool: slots for LoRA adapters, if requests may name adapters.
        exact: never quantise activations.
    """
    sampler = choose_sampler(mesh)
    experts = choose_grouped_matmul(expert_shapes(decoder, mesh), mesh)
    _log_choice("attention", attention)
    _log_choice("sampling", sampler)
    router = None
    if (moe := decoder.config.moe) is not None:
        _log_choice("experts", experts)
        chosen = choose_router(router_config(moe), moe.num_experts, mesh)
        _log_choice("routing", chosen)
        router = chosen.impl
    lora, lora_groups, lora_experts = _choose_lora(decoder, mesh, lora_pool)
    linear, linears = _choose_linears(decoder, mesh)
    backends = Backends(
        attention=attention.impl,
        sampler=sampler.impl,
        linear=linear,
        experts=experts.impl,
        router=router,
        lora=lora,
        lora_experts=lora_experts,
        norm=choose_norm(mesh).impl,
        rope=choose_rope(mesh).impl,
        head_matmul=choose_head_matmul(mesh).impl,
        linear_activations=_choose_activations(decoder, mesh, linear, exact=exact),
        expert_activations="exact" if moe is None else _of_experts(decoder, mesh, experts.impl, exact=exact),
    )
    return ChosenBackends(backends, linears, lora_groups)


def _choose_linears(decoder: Decoder, mesh: Mesh) -> tuple[GroupedMatmul, tuple[Path, ...]]:
    """Choose the kernel for linear modules, and the modules that it supports."""
    chosen: dict[Path, Choice[GroupedMatmul]] = {}
    by_kernel: dict[Path, GroupedMatmul] = {}
    for path, shape in linear_shapes(decoder, mesh).items():
        choice = choose_grouped_matmul([shape], mesh)
        if shape.format is not None:
            chosen[path] = choice
        # XLA multiplies by the others just as well, so that it is no fallback.
        elif choice.impl.max_dense_rows:
            by_kernel[path] = choice.impl
    _log_by_module("{}", chosen)
    by_kernel |= {path: choice.impl for path, choice in chosen.items() if choice.name != "xla"}
    return next(iter(by_kernel.values()), XlaGroupedMatmul()), tuple(by_kernel)


def _choose_activations(decoder: Decoder, mesh: Mesh, linear: GroupedMatmul, *, exact: bool) -> Activations:
    """Choose how activations are multiplied by the 8-bit weights of linear modules, and log it."""
    quantization = decoder.config.quantization
    shapes = [shape for shape in linear_shapes(decoder, mesh).values() if shape.format is not None]
    if quantization is None or quantization.activations == "exact" or exact or not shapes:
        return "exact"
    format = format_of(quantization)
    element, kind = quantization.element_type, mesh.devices.flat[0].device_kind
    takes = all(linear.takes_quantized_rows(format, shape.num_inputs) for shape in shapes)
    is_fast = multiplies(mesh, element)
    by_xla = has_row_scales(format) and (is_fast or quantization.activations == "requested")
    # Where the kernel leaves single bf16 matrices to XLA, XLA's products of 8 bits are the better ones, too.
    leaves_to_xla = linear.max_dense_rows == 0
    if takes and not (by_xla and is_fast and leaves_to_xla):
        choice: Activations = "kernel"
    elif by_xla:
        choice = "xla"
    else:
        logger.info("linear modules: activations are not quantised to %s, which %s does not multiply", element, kind)
        return "exact"
    logger.info("linear modules: activations of more than %d tokens are quantised to %s", MAX_EXACT_TOKENS, element)
    if choice == "xla" and not is_fast:
        logger.warning("%s does not multiply %s: --activation-quantization none is exact, and faster", kind, element)
    return choice


def _of_experts(decoder: Decoder, mesh: Mesh, matmul: GroupedMatmul, *, exact: bool) -> Activations:
    """Choose how activations are multiplied by the 8-bit weights of experts."""
    quantization = decoder.config.quantized("experts")
    if quantization is None or quantization.activations == "exact" or exact:
        return "exact"
    format = format_of(quantization)
    takes = all(matmul.takes_quantized_rows(format, shape.num_inputs) for shape in expert_shapes(decoder, mesh))
    done = "are quantised" if takes else "are not quantised: the kernel does not multiply them"
    logger.info("experts: activations of more than %d tokens %s", MAX_EXACT_TOKENS, done)
    return "kernel" if takes else "exact"


def linear_shapes(decoder: Decoder, mesh: Mesh) -> dict[Path, ExpertShape]:
    """Return the shapes of linear modules' matrices on one device, by path."""
    return {
        path[:-1]: _shard(decoder, mesh, spec, None if spec.packing is None else decoder.config.quantization)
        for path, spec in decoder.param_specs.items()
        if path[-1] == "weight" and spec.keep_stacked and len(spec.shape) == 3 and not spec.absorbed_only
    }


def _choose_lora(
    decoder: Decoder, mesh: Mesh, pool: LoraPoolLayout | None
) -> tuple[LoraMatmul, tuple[Path, ...], GroupedMatmul]:
    """Choose the LoRA kernel, the groups of modules that it supports, and the kernel for LoRA of experts."""
    if pool is None:
        return XlaLora(), (), XlaGroupedMatmul()
    chosen = {group: choose_lora(modules, mesh) for group, modules in lora_modules(decoder, pool, mesh).items()}
    _log_by_module("LoRA of {}", chosen)
    by_kernel = {group: choice.impl for group, choice in chosen.items() if choice.name != "xla"}
    experts: GroupedMatmul = XlaGroupedMatmul()
    if shapes := lora_expert_shapes(decoder, pool, mesh):
        choice = choose_grouped_matmul(shapes, mesh)
        _log_choice("LoRA of experts", choice)
        experts = choice.impl
    return next(iter(by_kernel.values()), XlaLora()), tuple(by_kernel), experts


def expert_shapes(decoder: Decoder, mesh: Mesh) -> set[ExpertShape]:
    """Return the shapes of the experts' matrices on one device."""
    quantization = decoder.config.quantized("experts")
    return {
        _shard(decoder, mesh, spec, quantization)
        for path, spec in decoder.param_specs.items()
        if spec.of_experts and path[-1] == "weight"
    }


def _shard(decoder: Decoder, mesh: Mesh, spec: ParamSpec, quantization: QuantizationConfig | None) -> ExpertShape:
    """Return the shape of a matrix's shard on one device."""
    format = None if quantization is None else format_of(quantization)
    shard = spec.shard_shape(mesh)
    num_inputs = spec.num_inputs * shard[-1] // spec.shape[-1]
    return ExpertShape(shard[-2], num_inputs, decoder.dtype, format, quantization is not None and quantization.zeros)


def _log_choice(op: str, choice: Choice[Any]) -> None:
    level = logging.WARNING if choice.is_fallback else logging.INFO
    logger.log(level, "%s backend: %s, %s", op, choice.name, choice.reason)


def _log_by_module(op: str, chosen: Mapping[Path, Choice[Any]]) -> None:
    """Log the choices for modules, with one line per outcome."""
    for outcome in dict.fromkeys(choice[1:] for choice in chosen.values()):
        same = {path: choice for path, choice in chosen.items() if choice[1:] == outcome}
        modules = (".".join(path).removeprefix("layers.") for path in same)
        _log_choice(op.format(", ".join(modules)), next(iter(same.values())))
