"""Every step within the scheduler's limits fits one of the buckets that are compiled, of which there are few."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import SchedulerConfig
from jaxserve.runner.buckets import ACCELERATOR_SHAPES, CPU_SHAPES, Bucket, StepShapes, make_buckets, pick_bucket


@given(
    max_rows=st.integers(1, 600),
    more_tokens=st.integers(0, 4096),
    steps=st.sampled_from([CPU_SHAPES, ACCELERATOR_SHAPES]),
    data=st.data(),
)
def test_every_step_within_the_limits_fits(
    max_rows: int, more_tokens: int, steps: StepShapes, data: st.DataObject
) -> None:
    config = SchedulerConfig(max_rows=max_rows, max_step_tokens=max_rows + more_tokens, context_length=8192)
    buckets = make_buckets(config, steps)
    num_rows = data.draw(st.integers(1, max_rows))
    num_tokens = data.draw(st.integers(num_rows, config.max_step_tokens))
    bucket = pick_bucket(buckets, num_tokens, num_rows, single_tokens=num_tokens == num_rows)
    assert bucket.num_tokens >= num_tokens
    assert bucket.num_rows >= num_rows
    assert num_tokens == num_rows or bucket.num_tokens > bucket.num_rows


def test_few_programs() -> None:
    defaults = SchedulerConfig(max_rows=32, max_step_tokens=512, context_length=8192)
    assert make_buckets(defaults, CPU_SHAPES) == (
        *(Bucket(num_tokens, 32) for num_tokens in (512, 256, 128, 64)),
        Bucket(32, 32),
        Bucket(32, 8),
        Bucket(8, 8),
        Bucket(2, 2),
    )


def test_a_step_over_the_limits_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens in 3 rows"):
        pick_bucket([Bucket(8, 8)], 9, 3, single_tokens=False)
