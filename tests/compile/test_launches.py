"""What a GPU launches for a layer of a decode step, and that CUDA graphs capture it."""

import re
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve.layout.layout import EngineLayout
from jaxserve.models.layer_scan import group_layers
from jaxserve.plan.cost import read_cost
from jaxserve.plan.hlo import HloProgram
from jaxserve.runner.buckets import Bucket, ForwardShape
from jaxserve.runner.programs import StepPrograms
from tests.compile.steps import layout_for
from tests.support.marks import slow

if jax.__version_info__ >= (0, 11):
    from tests.support.outcomes import compile_program, program_key

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")

DENSE, MOE, DEEPSEEK = 14, 30, 40
COLLECTIVES = ("kAllReduce", "kAllGather", "kReduceScatter")


def lower_decode(engine: EngineLayout, num_rows: int) -> jax.stages.Lowered:
    return StepPrograms(engine.step).lower_forward(ForwardShape(Bucket(num_rows, num_rows)))


@pytest.mark.parametrize("num_rows", [8, slow(32)])
@pytest.mark.parametrize(
    ("target", "model", "tp_size", "most"),
    [
        ("h100:1", "llama-3.1-8b", 1, DENSE),
        slow("h100:1", "qwen2.5-0.5b", 1, DENSE),
        slow("h100:1", "qwen3-4b", 1, DENSE),
        slow("h100:8", "llama-3.3-70b", 8, DENSE),
        ("h100:1", "qwen3-30b-a3b", 1, MOE),
        slow("h100:1", "qwen3-30b-a3b-fp8", 1, MOE),
        slow("h100:1", "gpt-oss-120b-mxfp4", 1, MOE),
        ("h200:8", "deepseek-v3.1", 8, DEEPSEEK),
        slow("h200:8", "kimi-k2-thinking", 8, DEEPSEEK),
    ],
)
def test_launches_of_a_layer(target: str, model: str, tp_size: int, most: int, num_rows: int) -> None:
    engine, _ = layout_for(target, model, tp_size)
    cost = read_cost(HloProgram(lower_decode(engine, num_rows).compile().as_text() or ""))
    groups = [group for group in group_layers(engine.step.decoder.config.layers) if group.repeats > 1]
    assert len(cost.launches_in_loops) == len(groups)
    for launches, group in zip(cost.launches_in_loops, groups, strict=True):
        assert launches <= most * len(group.kinds)


@pytest.mark.parametrize(
    ("target", "model", "tp_size"),
    [
        ("h100:1", "llama-3.1-8b", 1),
        slow("h100:8", "llama-3.3-70b", 8),
        slow("h100:1", "qwen3-30b-a3b-fp8", 1),
        slow("h100:1", "gpt-oss-120b-mxfp4", 1),
        ("h200:8", "deepseek-v3.1", 8),
    ],
)
def test_layers_are_captured_in_cuda_graphs(
    target: str, model: str, tp_size: int, outcomes: Any, tmp_path: Path
) -> None:
    """Only collectives run between the graphs of a layer."""
    engine, _ = layout_for(target, model, tp_size)
    bodies = loop_bodies(thunks_of(lower_decode(engine, 8), outcomes, tmp_path))
    assert bodies
    for kinds in bodies:
        assert "kCommandBuffer" in kinds
        assert set(kinds) <= {"kCommandBuffer", *COLLECTIVES}


@pytest.mark.parametrize(
    ("target", "model", "tp_size"),
    [("h100:1", "deepseek-v2-lite-experts", 1), slow("h200:8", "deepseek-v3.1", 8)],
)
def test_loops_over_pages_run_in_cuda_graphs(
    target: str, model: str, tp_size: int, outcomes: Any, tmp_path: Path
) -> None:
    """The pages that a prompt has are counted on the device: outside of a graph, the host would wait in every layer."""
    engine, _ = layout_for(target, model, tp_size)
    lowered = StepPrograms(engine.step).lower_forward(ForwardShape(engine.step.buckets[0], mha_prefill=True))
    loops = nesting_of(thunks_of(lowered, outcomes, tmp_path), "kWhile")
    inner = [outer for outer in loops if "kWhile" in outer]
    # All layers of a kind share a loop, and its body.
    assert len(inner) == len(loops) - len(inner) > 0
    assert all("kCommandBuffer" in outer for outer in inner)


def thunks_of(lowered: jax.stages.Lowered, outcomes: Any, folder: Path) -> str:
    """Return XLA's text of what the host of a GPU does to run a program."""

    def dump() -> str:
        compile_program(lowered, {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})
        (path,) = folder.glob("*thunk_sequence_after_thunk_passes.txt")
        return path.read_text()

    return outcomes.get(f"thunks-{program_key(lowered)}", dump)


def nesting_of(thunks: str, kind: str) -> list[list[str]]:
    """Return, for each thunk of a kind, the kinds of the thunks that it is a part of."""
    found: list[list[str]] = []
    around: list[tuple[int, str]] = []
    for line in thunks.splitlines():
        if (thunk := re.match(r"(\s*)\d+: (k\w+)", line)) is None:
            continue
        indent = len(thunk[1])
        around = [each for each in around if each[0] < indent]
        if thunk[2] == kind:
            found.append([outer for _, outer in around])
        around.append((indent, thunk[2]))
    return found


def loop_bodies(thunks: str) -> list[list[str]]:
    """Return the kinds of thunks in the body of each loop, without those that are part of others."""
    bodies: list[list[str]] = []
    depth = None
    for line in thunks.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip() == "body:":
            bodies.append([])
            depth = indent + 2
        elif depth is not None and indent < depth:
            depth = None
        elif indent == depth and (found := re.match(r"\s*\d+: (k\w+)", line)):
            bodies[-1].append(found[1])
    return bodies
