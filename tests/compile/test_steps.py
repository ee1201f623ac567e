"""The jitted step with its Pallas kernels, compiled by the real compilers of devices that are not attached.

In each program, the kernels occur once, the cache is updated in place, temporaries are small, everything fits the
device, and the collectives are the expected ones.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.config import LoraConfig
from jaxserve.errors import LaunchError
from jaxserve.models.layer_scan import group_layers
from jaxserve.plan.cost import read_cost
from jaxserve.plan.decode_load import DecodeLoad, roofline_share
from jaxserve.plan.hlo import COLLECTIVES, HloProgram, find_collectives
from jaxserve.plan.targets import parse_target
from jaxserve.runner.buckets import Bucket, ForwardShape, SampleShape
from jaxserve.runner.programs import StepPrograms
from kernels_pallas.grouped_matmul.xla.backend import XlaGroupedMatmul
from kernels_pallas.sampling.api import SamplingMode
from tests.compile.models import QWEN3_4B
from tests.compile.shares import DENSE_BOUND, MOE_BOUND
from tests.compile.steps import (
    CONTEXT,
    MODELS,
    check_cost,
    check_forward,
    check_program,
    count_kernels,
    layer_bytes,
    layout_for,
    num_matmuls,
)
from tests.support.marks import slow

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")

# Llama-3.1-8B does not fit one v5e, and 70B needs at least eight of the smaller devices.
STEPS = [
    slow("v5e:2x2", "qwen2.5-0.5b", 1),
    slow("v5e:2x2", "qwen3-4b", 4),
    slow("v5e:2x2", "llama-3.1-8b", 4),
    slow("v6e:2x4", "qwen2.5-0.5b", 1),
    slow("v6e:2x4", "qwen3-4b", 1),
    slow("v6e:2x4", "llama-3.1-8b", 1),
    slow("v6e:2x4", "llama-3.1-8b", 4),
    ("v6e:2x4", "llama-3.3-70b", 8),
    slow("v5p:2x2x2", "llama-3.3-70b", 8),
    slow("tpu7x:2x2x1", "llama-3.3-70b", 8),
    ("h100:1", "qwen2.5-0.5b", 1),
    slow("h100:1", "qwen3-4b", 1),
    slow("h100:1", "llama-3.1-8b", 1),
    slow("h100:8", "llama-3.1-8b", 4),
    ("h100:8", "llama-3.3-70b", 8),
    slow("h200:8", "llama-3.3-70b", 8),
]
# Each model on a TPU and on a GPU, and both vocabularies (Qwen's and Llama's) split and whole.
DECODE_STEPS = [
    ("v5e:2x2", "qwen2.5-0.5b", 1),
    slow("v5e:2x2", "llama-3.1-8b", 4),
    slow("h100:8", "qwen2.5-0.5b", 1),
    ("h100:8", "qwen3-4b", 8),
    slow("h100:8", "llama-3.1-8b", 1),
    slow("h100:8", "llama-3.3-70b", 8),
    slow("v6e:2x4", "qwen3-4b", 1),
    slow("v6e:2x4", "llama-3.3-70b", 8),
]


@pytest.mark.parametrize(("target", "model", "tp_size"), STEPS)
def test_mixed_step(target: str, model: str, tp_size: int, record_property: Callable[..., None]) -> None:
    """The widest step runs prompts and single tokens."""
    engine, weight_bytes = layout_for(target, model, tp_size)
    on_gpu = parse_target(target).device.platform == "gpu"
    assert engine.attention_name == ("gpu" if on_gpu else "tpu")
    step = StepPrograms(engine.step)
    memory_bytes = parse_target(target).device.memory_bytes
    program, memory = check_program(
        engine, lambda: step.lower_forward(ForwardShape(engine.step.buckets[0])), memory_bytes, record_property
    )
    # Decode and prefill; on GPUs separate kernels write the cache and merge the parts of rows.
    assert count_kernels(program) == (0, 4 if on_gpu else 2)
    # A layout of the weights that the compiler changes would show here.
    assert memory.temp_size_in_bytes < weight_bytes / 4
    check_forward(engine, program, memory, tp_size)


@pytest.mark.parametrize(("target", "model", "tp_size"), DECODE_STEPS)
def test_decode_and_sampling_programs(
    target: str, model: str, tp_size: int, record_property: Callable[..., None]
) -> None:
    engine, _ = layout_for(target, model, tp_size)
    on_gpu = parse_target(target).device.platform == "gpu"
    step, memory_bytes = StepPrograms(engine.step), parse_target(target).device.memory_bytes
    rows = engine.scheduler.max_rows
    program, memory = check_program(
        engine, lambda: step.lower_forward(ForwardShape(Bucket(rows, rows))), memory_bytes, record_property
    )
    (kind,) = dict.fromkeys(engine.step.decoder.config.layers)
    assert count_kernels(program) == (num_matmuls(engine, kind, rows), 3 if on_gpu else 1)
    check_forward(engine, program, memory, tp_size)
    check_cost(engine, program)
    assert roofline_share(engine, program, DecodeLoad(rows, CONTEXT // 8, rows)) >= 1 / DENSE_BOUND
    for mode in SamplingMode:
        lower = partial(step.lower_sample, SampleShape(rows, mode))
        program, memory = check_program(engine, lower, memory_bytes, record_property)
        # One pass over the logits, and on GPU the search of rows that its candidates do not decide.
        assert len(program.kernels) == (2 if on_gpu and mode != SamplingMode.PLAIN else 1)
        assert memory.alias_size_in_bytes >= 4 * (rows + 1) * engine.step.layout.vocab_size // tp_size
        exchanged = rows * engine.step.layout.vocab_size // tp_size if len(program.kernels) == 2 else 0
        _check_gathers(program, rows, tp_size, exchanged)
        if on_gpu or mode == SamplingMode.PLAIN:
            assert not read_cost(program).host_stops


@pytest.mark.parametrize(
    ("target", "model", "tp_size"),
    [
        ("h100:1", "llama-3.1-8b", 1),
        ("h100:1", "qwen2.5-0.5b", 1),  # has biases
        slow("h100:8", "llama-3.3-70b", 8),
        slow("v5e:2x2", "llama-3.1-8b", 4),
        ("v6e:2x4", "llama-3.1-8b", 1),
        slow("v5p:2x2x2", "llama-3.3-70b", 8),
    ],
)
def test_small_decode_steps_move_little_more_than_they_must(
    target: str, model: str, tp_size: int, record_property: Callable[..., None]
) -> None:
    engine, _ = layout_for(target, model, tp_size)
    step, memory_bytes = StepPrograms(engine.step), parse_target(target).device.memory_bytes
    for num_rows, loads in ((8, (1, 8)), (32, (32,))):
        lower = partial(step.lower_forward, ForwardShape(Bucket(num_rows, num_rows)))
        program, _ = check_program(engine, lower, memory_bytes, record_property)
        check_cost(engine, program)
        for rows in loads:
            assert roofline_share(engine, program, DecodeLoad(rows, CONTEXT // 8, num_rows)) >= 1 / DENSE_BOUND


@pytest.mark.parametrize(
    ("target", "model", "tp_size", "ep_size"),
    [
        slow("v6e:2x4", "qwen3-30b-a3b", 8, 2),
        slow("h100:1", "qwen3-30b-a3b", 1, 1),
        slow("h100:8", "qwen3-235b-a22b", 8, 8),
        slow("v5p:2x2x2", "mixtral-8x22b", 8, 8),
        slow("h100:8", "gpt-oss-20b", 4, 4),
        slow("h100:1", "qwen3-30b-a3b-fp8", 1, 1),
        ("h200:8", "deepseek-v3.1-experts", 8, 8),
        slow("h200:8", "deepseek-v3.1", 8, 8),
        slow("v5p:2x2x4", "deepseek-v3.1", 16, 16),
        slow("v5e:2x2", "gpt-oss-20b-mxfp4", 4, 4),
        ("v6e:2x4", "gpt-oss-120b-mxfp4", 8, 8),
        slow("h100:1", "gpt-oss-120b-mxfp4", 1, 1),
        slow("h200:8", "kimi-k2-thinking", 8, 8),
    ],
)
def test_step_with_experts(
    target: str, model: str, tp_size: int, ep_size: int, record_property: Callable[..., None]
) -> None:
    """Experts stay in the stack of all layers; a slice with one layer's would show among the temporaries."""
    engine, _ = layout_for(target, model, tp_size, ep_size=ep_size)
    on_gpu = parse_target(target).device.platform == "gpu"
    step, memory_bytes = StepPrograms(engine.step), parse_target(target).device.memory_bytes
    program, memory = check_program(
        engine, lambda: step.lower_forward(ForwardShape(engine.step.buckets[0])), memory_bytes, record_property
    )
    assert engine.attention_name == ("gpu" if on_gpu else "tpu")
    attention = 4 if on_gpu else 2
    assert not isinstance(engine.step.backends.experts, XlaGroupedMatmul)
    # gpt-oss alternates two kinds of layers, DeepSeek has some without experts before the others.
    kinds = [kind for group in group_layers(engine.step.decoder.config.layers) for kind in group.kinds]
    matmuls = sum(num_matmuls(engine, kind, engine.step.buckets[0].num_tokens) for kind in kinds)
    assert count_kernels(program) == (matmuls, attention * len(kinds))
    check_forward(engine, program, memory, tp_size)
    stacks = [spec for spec in engine.step.decoder.param_specs.values() if spec.of_experts]
    one_layer = sum(math.prod(spec.shape[1:]) * spec.dtype.itemsize for spec in stacks) / tp_size
    rows = engine.scheduler.max_rows
    program, memory = check_program(
        engine, lambda: step.lower_forward(ForwardShape(Bucket(rows, rows))), memory_bytes, record_property
    )
    assert memory.temp_size_in_bytes < one_layer
    check_cost(engine, program)
    for num_rows in (8, 32, rows):
        lower = partial(step.lower_forward, ForwardShape(Bucket(num_rows, num_rows)))
        program, _ = check_program(engine, lower, memory_bytes, record_property)
        assert roofline_share(engine, program, DecodeLoad(num_rows, CONTEXT // 8, num_rows)) >= 1 / MOE_BOUND


@pytest.mark.parametrize(
    ("target", "model", "tp_size"),
    [
        ("v6e:2x4", "deepseek-v2-lite-experts", 4),
        ("h100:1", "deepseek-v2-lite-experts", 1),
        slow("v6e:2x4", "deepseek-v2-lite", 4),
        slow("h100:1", "deepseek-v2-lite", 1),
        slow("v5p:2x2x4", "deepseek-v3.1", 16),
        slow("h200:8", "deepseek-v3.1", 8),
    ],
)
def test_step_with_mha_prefill(target: str, model: str, tp_size: int, record_property: Callable[..., None]) -> None:
    """MHA prefill adds no collective, and neither the cache nor the workspace is copied."""
    engine, _ = layout_for(target, model, tp_size, ep_size=tp_size)
    room = engine.step.mla_workspace
    assert room is not None
    step, memory_bytes = StepPrograms(engine.step), parse_target(target).device.memory_bytes
    shape = ForwardShape(engine.step.buckets[0], mha_prefill=True)
    program, memory = check_program(engine, lambda: step.lower_forward(shape), memory_bytes, record_property)
    check_forward(engine, program, memory, tp_size)
    for spec in room.backend.cache_spec().values():
        pages = (spec.shape[0], room.backend.config.num_kv_heads // tp_size)
        copies = [each for each, *_ in program.executed() if each.opcode.removesuffix("-start") == "copy"]
        assert not [each.name for each in copies if each.results[0].shape[:2] == pages]
    # The cache is written, rows of single tokens decode, and the workspace has its own backend.
    attention = 1 + 3 + 2 if target.startswith("h") else 3
    kinds = [kind for group in group_layers(engine.step.decoder.config.layers) for kind in group.kinds]
    matmuls = sum(num_matmuls(engine, kind, engine.step.buckets[0].num_tokens) for kind in kinds)
    assert count_kernels(program) == (matmuls, attention * len(kinds))


@pytest.mark.parametrize(("target", "model"), [("v6e:2x4", "qwen3-30b-a3b"), slow("h200:8", "deepseek-v3.1")])
def test_dp_attention_step_collectives(target: str, model: str, record_property: Callable[..., None]) -> None:
    """With --enable-dp-attention, only the tokens of all replicas and the experts' sums cross the devices."""
    engine, _ = layout_for(target, model, 1, dp_size=8, dp_attention=True)
    assert engine.attention_name == ("gpu" if target.startswith("h") else "tpu")
    step, memory_bytes = StepPrograms(engine.step), parse_target(target).device.memory_bytes
    rows = engine.scheduler.max_rows
    program, memory = check_program(
        engine, lambda: step.lower_forward(ForwardShape(Bucket(rows, rows))), memory_bytes, record_property
    )
    # Activations, experts and their weights are gathered; Hopper's compiler makes one all-gather of the three.
    gathers = 1 if target.startswith("h") else 3
    assert find_collectives(program)[:2] == ({"all-gather": gathers, "reduce-scatter": 1}, {})
    assert memory.alias_size_in_bytes >= engine.pool_bytes


@pytest.mark.parametrize(
    ("target", "model", "tp_size", "quantization"),
    [
        ("v5e:2x2", "qwen3-4b", 4, "int4"),
        slow("v6e:2x4", "qwen3-4b", 1, "int8"),
        ("v6e:2x4", "qwen3-4b", 1, "fp8"),
        slow("h100:8", "llama-3.1-8b", 4, "fp8"),
        ("h100:1", "qwen3-4b", 1, "int4"),
    ],
)
def test_decode_step_of_quantised_linear_maps(
    target: str, model: str, tp_size: int, quantization: str, record_property: Callable[..., None]
) -> None:
    """Weights are dequantised in the kernels, so no temporary is of a layer's size."""
    engine, _ = layout_for(target, model, tp_size, quantization=quantization)
    step, memory_bytes = StepPrograms(engine.step), parse_target(target).device.memory_bytes
    rows = engine.scheduler.max_rows
    program, memory = check_program(
        engine, lambda: step.lower_forward(ForwardShape(Bucket(rows, rows))), memory_bytes, record_property
    )
    assert len(engine.step.linears) == 7
    assert count_kernels(program) == ((4, 3) if target.startswith("h") else (7, 1))
    check_forward(engine, program, memory, tp_size)
    check_cost(engine, program)


@pytest.mark.parametrize(
    ("target", "model", "quantization", "product"),
    [
        ("v6e:2x4", "llama-3.1-8b", "w8a8_int8", r"= s32\[.*convolution\("),
        slow("v5e:2x2", "llama-3.1-8b", "w8a8_int8", r"= s32\[.*convolution\("),
        slow("tpu7x:2x2x1", "llama-3.1-8b", "w8a8_fp8", r"= f32\[.*convolution\(.*dim_labels=bf_oi->bf"),
        slow("h100:8", "llama-3.1-8b", "w8a8_int8", r"= \(s32\[.*__cublas\$lt\$matmul"),
        ("h100:8", "llama-3.1-8b", "w8a8_fp8", r"custom-call\(.*f8e4m3fn\[1,\d+,\d+\].*grouped_matmul"),
        slow("tpu7x:2x2x1", "qwen3-30b-a3b-fp8", None, r"custom-call\(.*f8e4m3fn\[\d+,\d+\]\{.*grouped_matmul"),
        ("h100:1", "qwen3-30b-a3b-fp8", None, r"custom-call\(.*f8e4m3fn\[1,\d+,\d+\].*grouped_matmul"),
    ],
)
def test_prompts_are_multiplied_in_8_bits(
    target: str, model: str, quantization: str | None, product: str, record_property: Callable[..., None]
) -> None:
    """Activations are quantised once for all modules that read them; neither weights nor the cache are copied."""
    tp_size = 4 if quantization else 1
    layouts = {
        mode: layout_for(target, model, tp_size, quantization=quantization, activation_quantization=mode)[0]
        for mode in ("auto", "none")
    }
    found: dict[str, int] = {}
    for mode, engine in layouts.items():
        step = StepPrograms(engine.step)
        lowered = step.lower_forward(ForwardShape(engine.step.buckets[0]))
        memory_bytes = parse_target(target).device.memory_bytes
        program, memory = check_program(engine, lambda lowered=lowered: lowered, memory_bytes, record_property)
        check_forward(engine, program, memory, tp_size)
        # Prompts have large activations, too, and TPUs prefetch weights to VMEM.
        num_tokens, limit = engine.step.buckets[0].num_tokens, layer_bytes(engine) / 4
        for each in read_cost(program).moved:
            one = each.instruction
            if each.trips > 1 and not one.opcode.endswith("-start") and num_tokens not in one.results[0].shape:
                assert each.written < limit, f"{one.name} writes {each.written} bytes"
        found[mode] = len(re.findall(product, lowered.compile().as_text() or ""))
    # Modules that read the same activations share a call of the GPU kernel. The output head is not quantised.
    assert found["none"] <= 1
    assert found["auto"] >= found["none"] + 4


def _check_gathers(program: HloProgram, rows: int, tp_size: int, exchanged: int) -> None:
    """Check that only candidates cross the devices in sampling, a few hundred words per row, and no logits.

    Only the search on GPU exchanges logits, so that each device has whole rows.
    """
    sizes = [
        math.prod(array.shape)
        for each, _, _ in program.executed()
        if each.opcode.removesuffix("-start") in COLLECTIVES
        for array in each.results
    ]
    assert bool(sizes) == (tp_size > 1)
    assert max(sizes, default=0) <= max(rows * tp_size * 300, exchanged)


@pytest.mark.parametrize("target", ["v6e:2x4", slow("h100:8")])
def test_data_parallel_step_has_no_collective_over_data(target: str, record_property: Callable[..., None]) -> None:
    """With --dp, no collective runs over the mesh axis `data`."""
    engine, _ = layout_for(target, "qwen2.5-0.5b", 2, dp_size=4)
    step, memory_bytes = StepPrograms(engine.step), parse_target(target).device.memory_bytes
    program, _ = check_program(
        engine, lambda: step.lower_forward(ForwardShape(engine.step.buckets[-1])), memory_bytes, record_property
    )
    assert find_collectives(program)[:2] == ({"all-reduce": 2}, {"all-reduce": 1})
    # Four groups of two neighbours: the mesh is (data, expert, model), and its last axis runs fastest.
    groups = (re.search(r"replica_groups=(\S+?),? ", each.attributes) for each, *_ in program.executed())
    assert {found[1] for found in groups if found} == {"[4,2]<=[8]"}


@pytest.mark.parametrize(
    ("target", "model", "tp_size"), [slow("v6e:2x4", "llama-3.1-8b", 4), ("h100:8", "llama-3.3-70b", 8)]
)
def test_step_with_adapters(target: str, model: str, tp_size: int, record_property: Callable[..., None]) -> None:
    """LoRA matrices are split like their weights: small all-reduces follow those of the base, and nothing else."""
    lora = LoraConfig(max_rank=16, target_modules=("all-linear",))
    engine, weight_bytes = layout_for(target, model, tp_size, lora=lora)
    step, memory_bytes = StepPrograms(engine.step), parse_target(target).device.memory_bytes
    program, memory = check_program(
        engine,
        lambda: step.lower_forward(ForwardShape(engine.step.buckets[0], adapted=True)),
        memory_bytes,
        record_property,
    )
    # Four shrink kernels (q, k and v share one, as do gate and up) and seven expand kernels.
    assert count_kernels(program)[1] == (4 if target.startswith("h") else 2) + 4 + 7
    assert memory.temp_size_in_bytes < weight_bytes / 4
    assert memory.alias_size_in_bytes >= engine.pool_bytes
    assert find_collectives(program)[:2] == ({"all-reduce": 4}, {"all-reduce": 1})


@pytest.mark.parametrize(("target", "tp_size", "ep_size"), [("v6e:2x4", 4, 2), ("h100:1", 1, 1)])
def test_step_with_adapted_experts(
    target: str, tp_size: int, ep_size: int, record_property: Callable[..., None]
) -> None:
    """Every linear map is adapted, routers and experts among them, and the program has the expected kernels."""
    lora = LoraConfig(max_rank=16, max_loras_per_batch=3, target_modules=("all",))
    options = {"ep_size": ep_size, "lora": lora, "max_total_tokens": 65536, "max_running_requests": 64}
    engine, _ = layout_for(target, "qwen3-30b-a3b", tp_size, **options)
    step, memory_bytes = StepPrograms(engine.step), parse_target(target).device.memory_bytes
    program, memory = check_program(
        engine,
        lambda: step.lower_forward(ForwardShape(engine.step.buckets[-1], adapted=True)),
        memory_bytes,
        record_property,
    )
    # Experts, two for the adapters of each of their projections, and on GPUs q, k, v, and o, and the router.
    matmuls = 2 + 3 * 2 + 3 if target.startswith("h") else 3 + 3 * 2
    # Attention; shrink for q, k, v, for o, and for the router; expand for these five; both for the head.
    assert count_kernels(program) == (matmuls, (3 if target.startswith("h") else 1) + 3 + 5 + 2)
    assert memory.alias_size_in_bytes >= engine.pool_bytes


@pytest.mark.parametrize("target", [slow("v6e:2x4"), "h100:1"])
def test_sampler_compiles_for_the_largest_vocabulary(
    target: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[..., None]
) -> None:
    monkeypatch.setitem(MODELS, "large vocabulary", QWEN3_4B | {"vocab_size": 262144})
    engine, _ = layout_for(target, "large vocabulary", 1)
    memory_bytes = parse_target(target).device.memory_bytes
    lower = partial(StepPrograms(engine.step).lower_sample, SampleShape(8, SamplingMode.ADJUSTED))
    program, _ = check_program(engine, lower, memory_bytes, record_property)
    assert len(program.kernels) == (2 if target.startswith("h") else 1)


@pytest.mark.slow
def test_blackwell_runs_the_portable_step(caplog: Any) -> None:
    engine, _ = layout_for("b200:1", "qwen3-4b", 1)
    assert engine.attention_name == "xla"
    assert [text.split(":")[0] for text in caplog.messages if "only Hopper" in text] == [
        "attention backend", "sampling backend"
    ]  # fmt: skip
    step = StepPrograms(engine.step)
    rows = engine.scheduler.max_rows
    sample = SampleShape(rows, SamplingMode.ADJUSTED)
    for lowered in (step.lower_forward(ForwardShape(Bucket(rows, rows))), step.lower_sample(sample)):
        compiled = lowered.compile()
        assert compiled.memory_analysis() is not None
        assert not HloProgram(compiled.as_text() or "").kernels


def test_explicit_backend_raises_if_unsupported() -> None:
    with pytest.raises(Exception, match="support only Hopper"):
        layout_for("b200:1", "qwen3-4b", 1, attention_backend="gpu")
    with pytest.raises(Exception, match="do not run on"):
        layout_for("v6e:2x4", "qwen3-4b", 1, attention_backend="gpu")


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("v6e:2x4", "int8"),
        ("h100:1", "fp8_e4m3"),
        slow("v6e:2x4", "fp8_e4m3"),
        slow("h100:1", "int8"),
    ],
)
def test_quantised_cache(target: str, dtype: str, record_property: Callable[..., None]) -> None:
    engine, _ = layout_for(target, "qwen3-4b", 1, kv_cache_dtype=dtype)
    plain, _ = layout_for(target, "qwen3-4b", 1)
    assert engine.cache.num_pages == pytest.approx(2 * plain.cache.num_pages, rel=0.01)
    step = StepPrograms(engine.step)
    program, memory = check_program(
        engine,
        lambda: step.lower_forward(ForwardShape(engine.step.buckets[-2])),
        parse_target(target).device.memory_bytes,
        record_property,
    )
    check_forward(engine, program, memory, 1)


def test_long_contexts_take_larger_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPU's page table has to fit its scalar memory."""
    engine, _ = layout_for("v6e:2x4", "llama-3.1-8b", 4, context_length=131072)
    assert engine.cache.page_size == 256
    step = StepPrograms(engine.step)
    rows = engine.scheduler.max_rows
    assert step.lower_forward(ForwardShape(Bucket(rows, rows))).compile().memory_analysis() is not None
    with pytest.raises(LaunchError, match=r"--max-running-requests 512 with --context-length 131072 is more than"):
        layout_for("v6e:2x4", "llama-3.1-8b", 4, context_length=131072, max_running_requests=512)
    monkeypatch.setitem(MODELS["qwen3-4b"], "max_position_embeddings", 262144)
    engine, _ = layout_for("v6e:2x4", "qwen3-4b", 1, context_length=None)
    assert (engine.cache.page_size, engine.scheduler.max_rows) == (256, 128)
    engine, _ = layout_for("h100:8", "llama-3.1-8b", 4, context_length=131072)
    assert engine.cache.page_size == 128


def test_penalty_counts_are_sharded_over_vocabulary() -> None:
    engine, _ = layout_for("v6e:2x4", "llama-3.3-70b", 8)
    state = StepPrograms(engine.step).state_shapes()
    counts = state.sampling.counts_RV
    assert counts.sharding.shard_shape(counts.shape)[1] * 8 == engine.step.layout.vocab_size
    assert counts.dtype == jnp.int32
