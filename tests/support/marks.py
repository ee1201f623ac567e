"""Pytest marks for parametrised cases."""

from functools import partial

import pytest

# A parametrised case that resembles one that always runs; only `scripts/test --all` runs it.
slow = partial(pytest.param, marks=pytest.mark.slow)
