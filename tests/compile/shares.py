"""The shares of the roofline that decode steps allow, as `docs/predicted-shares.md` has them."""

from typing import NamedTuple

from jaxserve.plan.cost import read_cost
from jaxserve.plan.decode_load import DecodeLoad, roofline_share
from jaxserve.plan.hlo import HloProgram
from jaxserve.runner.buckets import Bucket, ForwardShape
from jaxserve.runner.programs import StepPrograms
from tests.compile.steps import CONTEXT, layout_for, on_gpu

# Bytes that a decode step of a dense model may move, over those that must move.
DENSE_BOUND = 1.15
# The same for experts, MLA and quantised weights.
MOE_BOUND = 1.25
# Rows that are in use, and rows that the step is compiled for.
LOADS = ((1, 8), (8, 8), (32, 32), (256, 256))


class ShareCase(NamedTuple):
    """A model on a target, with its devices."""

    target: str
    model: str
    tp_size: int


CASES = (
    ShareCase("h100:1", "llama-3.1-8b", 1),
    ShareCase("h100:8", "llama-3.3-70b", 8),
    ShareCase("v5e:2x2", "llama-3.1-8b", 4),
    ShareCase("v6e:2x4", "llama-3.1-8b", 1),
    ShareCase("v5p:2x2x2", "llama-3.3-70b", 8),
    ShareCase("h100:1", "qwen3-30b-a3b", 1),
    ShareCase("h100:1", "qwen3-30b-a3b-fp8", 1),
    ShareCase("v6e:2x4", "qwen3-30b-a3b", 8),
    ShareCase("v6e:2x4", "qwen3-30b-a3b-fp8", 8),
    ShareCase("h100:1", "gpt-oss-120b-mxfp4", 1),
    ShareCase("h200:8", "deepseek-v3.1", 8),
    ShareCase("v5p:2x2x4", "deepseek-v3.1", 16),
    ShareCase("h200:8", "kimi-k2-thinking", 8),
)
HEADER = f"""# Predicted shares of the roofline

Bytes that a decode step must move over the bytes that its compiled program moves, from the scheduled HLO of the
target's own compiler (decision 46), for requests with {CONTEXT // 8:,} tokens of context. Steps are compiled for 8, 32
and 256 rows; one request runs in the smallest. On GPU also the launches of a layer at 8 rows, collectives apart; where
kinds of layers differ, of each repeating group. The figures are bytes, not time: no step has run on these devices.
Written by `scripts/predicted_shares.py`.
"""


def share_row(case: ShareCase) -> str:
    """Return a row of the table; compiles three programs."""
    engine, _ = layout_for(*case)
    programs = {
        num_rows: HloProgram(
            StepPrograms(engine.step).lower_forward(ForwardShape(Bucket(num_rows, num_rows))).compile().as_text() or ""
        )
        for num_rows in dict.fromkeys(num_rows for _, num_rows in LOADS)
    }
    shares = [
        roofline_share(engine, programs[num_rows], DecodeLoad(rows, CONTEXT // 8, num_rows)) for rows, num_rows in LOADS
    ]
    launches = ", ".join(map(str, read_cost(programs[LOADS[0][1]]).launches_in_loops)) if on_gpu(engine) else ""
    cells = [case.model, case.target, str(case.tp_size), *(f"{share:.2f}" for share in shares), launches]
    return f"| {' | '.join(cells)} |"


def table_head() -> str:
    """Return the head of the table."""
    names = ["model", "target", "devices", *(f"{rows} rows" for rows, _ in LOADS), "launches"]
    return f"| {' | '.join(names)} |\n|{' --- |' * len(names)}"
