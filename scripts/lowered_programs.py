"""Print a hash of every golden model's programs, to show that a refactoring changes none of them.

PYTHONPATH=. python scripts/lowered_programs.py [MODEL ...] > hashes.txt

The hash covers the data flow from a function's results back to its arguments. It depends neither on the names of
Python functions nor on the order of independent operations.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import hashlib
import json

import jax
from jaxlib.mlir import ir

from jaxserve.config import EngineConfig, LoraConfig
from jaxserve.errors import LaunchError
from jaxserve.layout.expert_groups import choose_ep_size
from jaxserve.layout.layout import layout_engine, layout_model
from jaxserve.parallel.mesh import make_mesh
from jaxserve.plan.compile import adapter_slots
from jaxserve.runner.buckets import SampleShape
from jaxserve.runner.programs import StepPrograms

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SIZES: dict[str, Any] = {
    "page_size": 8,
    "max_total_tokens": 512,
    "max_running_requests": 4,
    "chunked_prefill_size": 32,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deterministic": {"deterministic": True},
    "tp2": {"tp_size": 2},
    "dp2": {"dp_size": 2, "tp_size": 2},
    "dp_attention": {"dp_size": 2, "tp_size": 2, "dp_attention": True},
    "int8_cache": {"kv_cache_dtype": "int8"},
    "quantized": {"quantization": "int8"},
    "lora": {"lora": LoraConfig(max_rank=4, target_modules=("all",))},
    "lora_tp2": {"tp_size": 2, "lora": LoraConfig(max_rank=4, target_modules=("all",))},
}
# One model of each kind of block runs with every option, the others only with `plain`.
WITH_OPTIONS = ("qwen2_windows", "qwen3_moe", "gpt_oss", "deepseek_v3_fp8", "gemma3")


def programs(model: str, options: dict[str, Any]) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """Yield the name and lowered module of each program."""
    config = EngineConfig(model_path=model, **SIZES, **options)
    hf_config = json.loads((GOLDEN / model / "config.json").read_text())
    ep_size = choose_ep_size(config, hf_config, jax.default_backend())
    layout = layout_model(config, hf_config, make_mesh(config.tp_size, config.dp_size, ep_size))
    pool = None if config.lora is None else adapter_slots(config.lora, layout)
    engine = layout_engine(config, layout, 1 << 26, pool)
    step = StepPrograms(engine.step)
    for shape in engine.step.shapes:
        yield "forward " + " ".join(map(str, (*shape.bucket, *shape[1:]))), step.lower_forward(shape)
    for mode in engine.step.sample_modes:
        yield f"sample {mode.name.lower()}", step.lower_sample(SampleShape(4, mode))


class GraphHash:
    """Hashes a module's data flow."""

    def __init__(self, module: ir.Module) -> None:
        self._functions = {ir.StringAttr(op.attributes["sym_name"]).value: op for op in module.body.operations}
        self._done: dict[str, str] = {}

    def of(self, function: str) -> str:
        """Return the hash of a function's results."""
        if function not in self._done:
            op = self._functions[function]
            attributes = [str(named) for name, named in _attributes(op) if name not in ("sym_name", "sym_visibility")]
            blocks = [self._block(block, {}, 0) for region in op.regions for block in region]
            self._done[function] = _digest(*attributes, *blocks)
        return self._done[function]

    def _block(self, block: ir.Block, values: dict[ir.Value, str], depth: int) -> str:
        values = {**values, **{arg: f"{depth} {i} {arg.type}" for i, arg in enumerate(block.arguments)}}
        last = ""
        for op in block.operations:
            last = self._operation(op, values, depth)
            values |= {result: f"{last} {i}" for i, result in enumerate(op.results)}
        return last

    def _operation(self, op: ir.OpView, values: dict[ir.Value, str], depth: int) -> str:
        parts = [op.operation.name, *(str(result.type) for result in op.results)]
        for name, attribute in _attributes(op):
            called = isinstance(attribute, ir.FlatSymbolRefAttr) and attribute.value in self._functions
            parts.append(self.of(attribute.value) if called else f"{name} {attribute}")
        parts += [values[operand] for operand in op.operands]
        parts += [self._block(block, values, depth + 1) for region in op.regions for block in region]
        return _digest(*parts)


def _attributes(op: Any) -> list[tuple[str, ir.Attribute]]:
    return sorted(((named, op.attributes[named]) for named in op.attributes), key=lambda item: item[0])


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def main() -> None:
    """Print a line per program."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    for model in sys.argv[1:] or sorted(path.name for path in GOLDEN.iterdir()):
        for name, options in OPTIONS.items():
            if name != "plain" and model not in WITH_OPTIONS:
                continue
            try:
                for program, lowered in programs(model, options):
                    module: Any = lowered.compiler_ir("stablehlo")
                    print(model, name, program, GraphHash(module).of("main"), flush=True)
            except LaunchError as error:
                print(model, name, error)


if __name__ == "__main__":
    main()
