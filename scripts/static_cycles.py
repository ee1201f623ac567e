"""Write docs/static-cycles.md: the least cycles of kernels beside those of their memory.

PYTHONPATH=. python scripts/static_cycles.py
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.compile.cycles import CASES, HEADER, CycleCase, compile_case, count_cycles, cycle_row

PAGE = Path(__file__).parents[1] / "docs" / "static-cycles.md"


def main() -> None:
    """Compile every case."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = list(pool.map(_compile, CASES))
    rows = [cycle_row(case, count_cycles(case, code)) for case, code in zip(CASES, codes, strict=True)]
    print("\n".join(rows))
    PAGE.write_text(HEADER + "\n".join(rows) + "\n")


def _compile(case: CycleCase) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return compile_case(case, Path(folder))


if __name__ == "__main__":
    main()
