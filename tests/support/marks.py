"""Marks of cases."""

from functools import partial

import pytest

# A case that is like one that always runs: a row of a grid, left to `scripts/test --all`.
slow = partial(pytest.param, marks=pytest.mark.slow)
