"""The split of a profile into kernels, XLA and idle time."""

import pytest

from jaxserve.device_check.steps import Activity, split_activities


def test_parts_of_a_profile() -> None:
    """Two streams: what runs at the same time as a kernel counts as the kernel's."""
    parts = split_activities(
        [
            Activity("fusion.1", 0, 100),
            Activity("paged_decode.2", 50, 250),
            Activity("all-reduce", 300, 400),
            Activity("loop_fusion", 390, 420),
            Activity("rms_norm", 500, 600),
        ]
    )
    assert parts.kernels == pytest.approx(300e-9)
    assert parts.xla == pytest.approx((50 + 120) * 1e-9)
    assert parts.idle == pytest.approx((50 + 80) * 1e-9)
