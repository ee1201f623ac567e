"""Grouping of repeating layers, whatever comes before and after them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.models.layer_scan import group_layers


@pytest.mark.parametrize(
    ("kinds", "groups"),
    [
        ("A", [("A", 1)]),
        ("AAAA", [("A", 4)]),
        ("WFWFWF", [("WF", 3)]),
        ("DDD" + "M" * 58, [("D", 3), ("M", 58)]),
        ("LLLLLG" * 4 + "LL", [("LLLLLG", 4), ("L", 2)]),
        ("AB", [("A", 1), ("B", 1)]),
    ],
)
def test_groups(kinds: str, groups: list[tuple[str, int]]) -> None:
    assert [("".join(group.kinds), group.repeats) for group in group_layers(kinds)] == groups


@given(st.text("AB", min_size=1, max_size=40))
def test_groups_are_the_layers_in_order(kinds: str) -> None:
    groups = group_layers(kinds)
    assert "".join("".join(group.kinds) * group.repeats for group in groups) == kinds
    assert [group.first for group in groups] == [
        sum(len(other.kinds) * other.repeats for other in groups[:index]) for index in range(len(groups))
    ]
