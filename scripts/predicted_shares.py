"""Write docs/predicted-shares.md: the shares of the roofline that compiled decode steps allow.

PYTHONPATH=. python scripts/predicted_shares.py
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.compile.shares import CASES, HEADER, share_row, table_head

PAGE = Path(__file__).parents[1] / "docs" / "predicted-shares.md"


def main() -> None:
    """Compile every case."""
    rows: list[str] = []
    for case in CASES:
        rows.append(share_row(case))
        print(rows[-1], flush=True)
    PAGE.write_text("\n".join((HEADER, table_head(), *rows)) + "\n")


if __name__ == "__main__":
    main()
