"""Children that crash, hang, or never begin; the tasks behind the one that failed are still done."""

import sys
from collections.abc import Sequence

import pytest

from jaxserve.device_check.children import ChildFailedError, run_children
from jaxserve.device_check.events import Begin, Outcome

# Three tasks; the second does what the test says.
CHILD = """
import json, os, sys, time
for index in range(int(sys.argv[1]), 3):
    print(json.dumps({"type": "begin", "index": index, "label": f"tiny: sampling, call {index}"}), flush=True)
    if index == 1:
        print("the driver's last words", file=sys.stderr, flush=True)
        BREAK
    result = {"type": "outcome", "model": "tiny", "op": "sampling", "name": f"call {index}", "status": "passed"}
    print(json.dumps(result), flush=True)
    if index == 1:
        AFTERWARDS
"""


def outcomes(what: str, timeout_s: float = 60.0, *, afterwards: str = "pass") -> list[Outcome]:
    def command(first: int) -> Sequence[str]:
        return [sys.executable, "-c", CHILD.replace("BREAK", what).replace("AFTERWARDS", afterwards), str(first)]

    events = list(run_children(command, timeout_s))
    assert [event.index for event in events if isinstance(event, Begin)] == [0, 1, 2]
    return [event for event in events if isinstance(event, Outcome)]


def test_all_tasks() -> None:
    assert [outcome.status for outcome in outcomes("pass")] == ["passed"] * 3


def test_a_crash() -> None:
    first, second, third = outcomes("os.abort()")
    assert (first.status, third.status) == ("passed", "passed")
    assert (second.status, second.model, second.op, second.name) == ("crashed", "tiny", "sampling", "call 1")
    assert second.detail == "ended by signal 6: the driver's last words"


def test_a_crash_after_a_task_is_not_the_task_s() -> None:
    assert [outcome.status for outcome in outcomes("pass", afterwards="os.abort()")] == ["passed"] * 3


def test_a_task_that_never_ends() -> None:
    first, second, third = outcomes("time.sleep(600)", timeout_s=1.0)
    assert (first.status, third.status) == ("passed", "passed")
    assert (second.status, second.detail) == ("timed out", "no result after 1 s")


def test_a_child_that_never_begins() -> None:
    with pytest.raises(ChildFailedError, match="crashed before its first task: no driver"):
        list(run_children(lambda _: [sys.executable, "-c", "import sys; sys.exit('no driver')"], 60.0))
