"""Layouts of published models on targets, and the checks that every program of a step must pass."""

import time
from collections.abc import Callable
from typing import Any

import jax

from jaxserve.config import EngineConfig, LayerConfig
from jaxserve.layout.expert_groups import choose_ep_size
from jaxserve.layout.layout import EngineLayout, layout_engine, layout_model
from jaxserve.layout.memory import DEVICE_MEM_FRACTION
from jaxserve.models.layer_scan import group_layers
from jaxserve.parallel.mesh import mesh_of
from jaxserve.plan.compile import adapter_slots
from jaxserve.plan.cost import read_cost
from jaxserve.plan.hlo import HloProgram, find_collectives
from jaxserve.plan.targets import parse_target, prepare_environment, target_devices
from kernels_pallas.grouped_matmul.xla.backend import XlaGroupedMatmul
from tests.compile.models import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V2_LITE_EXPERTS,
    DEEPSEEK_V31,
    DEEPSEEK_V31_EXPERTS,
    GPT_OSS_20B,
    GPT_OSS_20B_MXFP4,
    GPT_OSS_120B_MXFP4,
    KIMI_K2_THINKING,
    LLAMA31_8B,
    LLAMA33_70B,
    MIXTRAL_8X22B,
    QWEN3_4B,
    QWEN3_30B_A3B,
    QWEN3_30B_A3B_FP8,
    QWEN3_235B_A22B,
    QWEN25_05B,
)

MODELS = {
    "qwen2.5-0.5b": QWEN25_05B,
    "qwen3-4b": QWEN3_4B,
    "llama-3.1-8b": LLAMA31_8B,
    "llama-3.3-70b": LLAMA33_70B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "qwen3-235b-a22b": QWEN3_235B_A22B,
    "mixtral-8x22b": MIXTRAL_8X22B,
    "gpt-oss-20b": GPT_OSS_20B,
    "qwen3-30b-a3b-fp8": QWEN3_30B_A3B_FP8,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "deepseek-v2-lite-experts": DEEPSEEK_V2_LITE_EXPERTS,
    "deepseek-v3.1": DEEPSEEK_V31,
    "deepseek-v3.1-experts": DEEPSEEK_V31_EXPERTS,
    "gpt-oss-20b-mxfp4": GPT_OSS_20B_MXFP4,
    "gpt-oss-120b-mxfp4": GPT_OSS_120B_MXFP4,
    "kimi-k2-thinking": KIMI_K2_THINKING,
}
CONTEXT = 16384


def layout_for(target_text: str, model: str, tp_size: int, **options: Any) -> tuple[EngineLayout, int]:
    target = parse_target(target_text)
    prepare_environment(target)
    options = {"context_length": CONTEXT, **options}
    config = EngineConfig(model_path=model, tp_size=tp_size, **options)
    ep_size = choose_ep_size(config, MODELS[model], target.device.platform)
    layout = layout_model(config, MODELS[model], mesh_of(target_devices(target), tp_size, config.dp_size, ep_size))
    left = target.device.memory_bytes - layout.device_weight_bytes
    adapters = None if config.lora is None else adapter_slots(config.lora, layout)
    return layout_engine(config, layout, int(left * DEVICE_MEM_FRACTION), adapters), layout.device_weight_bytes


def check_program(
    engine: EngineLayout, lower: Callable[[], jax.stages.Lowered], memory_bytes: int, record: Callable[..., None]
) -> tuple[HloProgram, Any]:
    """Compile a program, check that it fits the device, and return it with its memory figures."""
    lowered = lower()
    started = time.perf_counter()
    compiled = lowered.compile()
    record("compile_s", round(time.perf_counter() - started, 1))
    program, memory = HloProgram(compiled.as_text() or ""), compiled.memory_analysis()
    assert memory is not None
    record("temporary_mib", round(memory.temp_size_in_bytes / 2**20, 1))
    assert memory.temp_size_in_bytes < memory_bytes / 10
    # Donated arguments and their results share memory.
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert used + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes <= memory_bytes
    return program, memory


def check_forward(engine: EngineLayout, program: HloProgram, memory: Any, tp_size: int) -> None:
    """Check that the cache is updated in place, that no page is copied, and that each layer has two all-reduces."""
    assert memory.alias_size_in_bytes >= engine.pool_bytes
    num_pages = {spec.shape[0] for spec in engine.step.backends.attention.cache_spec().values()}
    for each, *_ in program.executed():
        if each.opcode.removesuffix("-start") == "copy":
            assert each.results[0].shape[:1] not in {(number,) for number in num_pages}, f"{each.name} copies the cache"
    groups = group_layers(engine.step.decoder.config.layers)
    in_loops, alone = (
        sum(len(group.kinds) for group in groups if (group.repeats > 1) == loop) for loop in (True, False)
    )
    found = find_collectives(program)
    if tp_size == 1:
        assert not found.per_layer
        assert not found.once
    else:
        # The embedding's rows are on different shards, which takes one more all-reduce, outside of the loops.
        assert found.per_layer == ({"all-reduce": 2 * in_loops} if in_loops else {})
        assert found.once == {"all-reduce": 1 + 2 * alone}


def check_cost(engine: EngineLayout, program: HloProgram) -> None:
    """Check that no layer's weights are copied, nothing is computed twice, and a GPU's host never waits."""
    cost = read_cost(program)
    if on_gpu(engine):
        assert not cost.rematerialized
        assert not cost.host_stops
    limit = layer_bytes(engine) / 4
    for each in cost.moved:
        assert each.trips == 1 or each.written < limit, f"{each.instruction.name} writes {each.written} bytes"


def num_matmuls(engine: EngineLayout, kind: LayerConfig, num_tokens: int) -> int:
    """Return the calls of the grouped matmul in a layer; on GPUs, projections of the same activations share one."""
    step = engine.step
    linear, of_experts = step.backends.linear, 0
    if kind.mlp == "experts" and not isinstance(step.backends.experts, XlaGroupedMatmul):
        of_experts = 2 if on_gpu(engine) else 3
    parts = ("attention", "moe" if kind.mlp == "experts" else "mlp")
    calls = set[tuple[str, ...]]()
    for path in step.linears:
        spec = step.decoder.param_specs[*path, "weight"]
        if path[1] in parts and (spec.packing is not None or num_tokens <= linear.max_dense_rows):
            calls.add((*path[:-1], *(step.decoder.lora_group(path) if on_gpu(engine) else path[-1:])))
    return of_experts + len(calls)


def count_kernels(program: HloProgram) -> tuple[int, int]:
    """Return how many kernels a program calls: grouped matmuls, and kernels of attention, sampling and LoRA."""
    matmuls = program.kernels.count("grouped_matmul")
    small = sum(program.kernels.count(name) for name in ("rms_norm", "rope", "route", "head_matmul"))
    return matmuls, len(program.kernels) - matmuls - small


def on_gpu(engine: EngineLayout) -> bool:
    return engine.step.mesh.devices.flat[0].platform in ("gpu", "cuda")


def layer_bytes(engine: EngineLayout) -> float:
    """Return the bytes of a layer's weights on a device; kinds of layers with different modules count together."""
    specs = [spec for spec in engine.step.decoder.param_specs.values() if spec.layers]
    return sum(spec.shard_bytes(engine.step.mesh) / len(spec.layers) for spec in specs)
