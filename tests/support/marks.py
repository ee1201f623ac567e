"""Marks of cases."""

from functools import partial

import pytest

# A case that others are like: `scripts/test` leaves it out, `scripts/test -m exhaustive` runs it.
beside = partial(pytest.param, marks=pytest.mark.exhaustive)
