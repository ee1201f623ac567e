"""The code of decode kernels needs no more cycles than memory, or, where it does, no more than it did."""

from pathlib import Path
from typing import Any

import jax
import pytest

from tests.support.marks import slow

if jax.__version_info__ >= (0, 11):
    from tests.compile.cycles import CASES, HEADER, CycleCase, compile_case, count_cycles, row_head
    from tests.support.outcomes import program_key
else:
    CASES = []

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
PAGE = Path(__file__).parents[2] / "docs" / "static-cycles.md"
QUICK = (
    ("h100:1", "fp8 in blocks"),
    ("h100:1", "Llama-3.1-8B"),
    ("v6e:2x2", "fp8 in blocks"),
    ("v6e:2x2", "Llama-3.1-8B, fp8 cache"),
)
# Where the code is the bound, how much at most.
MOST = {"mxfp4": 2.5, "int4 with zeros": 3.6, "DeepSeek-V3.1 on 8 devices, fp8 cache": 1.3}


@pytest.mark.parametrize("case", [case if (case.target, case.name) in QUICK else slow(case) for case in CASES], ids=str)
def test_code_keeps_up_with_memory(case: "CycleCase", outcomes: Any, tmp_path: Path) -> None:
    code = outcomes.get(f"code-{program_key(case.lower())}", lambda: compile_case(case, tmp_path))
    cycles = count_cycles(case, code)
    assert cycles.ratio <= MOST.get(case.name, 1.0)
    page = PAGE.read_text()
    assert page.startswith(HEADER)
    (row,) = (row for row in page.splitlines() if row.startswith(row_head(case)))
    # Compilers change.
    assert float(row.split("|")[-2]) == pytest.approx(cycles.ratio, rel=0.1)
