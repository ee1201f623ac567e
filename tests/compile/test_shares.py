"""The page of predicted shares says what the compilers say."""

from pathlib import Path

import jax
import pytest

from tests.compile.shares import CASES, DENSE_BOUND, HEADER, LOADS, MOE_BOUND, ShareCase, share_row
from tests.support.marks import slow

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
PAGE = Path(__file__).parents[2] / "docs" / "predicted-shares.md"
# The others take minutes.
QUICK = ("llama-3.1-8b", "qwen3-30b-a3b")


@pytest.mark.parametrize(
    "case", [(case if case.target == "h100:1" and case.model in QUICK else slow(case)) for case in CASES], ids=str
)
def test_the_page_is_up_to_date(case: ShareCase) -> None:
    """If this fails because a step costs less, run `scripts/predicted_shares.py`."""
    page = PAGE.read_text()
    assert page.startswith(HEADER)
    assert share_row(case) in page.splitlines()


def test_the_page_keeps_the_bounds() -> None:
    """With `test_the_page_is_up_to_date`, no model moves more than its bound allows at any number of rows."""
    rows = [row.strip("| ").split(" | ") for row in PAGE.read_text().splitlines() if row.startswith("| ")][2:]
    assert [tuple(row[:3]) for row in rows] == [(case.model, case.target, str(case.tp_size)) for case in CASES]
    for model, _, _, *shares in rows:
        bound = DENSE_BOUND if model.startswith("llama") else MOE_BOUND
        assert all(float(share) >= round(1 / bound, 2) for share in shares[: len(LOADS)])
