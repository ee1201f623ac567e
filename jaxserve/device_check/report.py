"""The results of a check: as JSON, and as a page of text to paste into an issue."""

from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from jaxserve.device_check.events import DeviceInfo, Event, Outcome, Speed, StepSpeed, Tuned

_FAILED = ("failed", "crashed", "timed out")
# Shares of the roofline below this are pointed out.
_SLOW = 0.5
_MAX_DETAIL = 200


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All results.

    Attributes:
        device: the devices and the software.
        outcomes: calls of kernels.
        speeds: speeds of kernels.
        steps: speeds of whole steps.
        tuned: fastest tiles.
    """

    device: DeviceInfo
    outcomes: Sequence[Outcome]
    speeds: Sequence[Speed]
    steps: Sequence[StepSpeed]
    tuned: Sequence[Tuned]

    @property
    def failures(self) -> list[Outcome]:
        """Calls that were wrong, crashed or did not end."""
        return [outcome for outcome in self.outcomes if outcome.status in _FAILED]

    def text(self) -> str:
        """Return the page of text."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        device = self.device
        memory = f", {device.memory_bytes / 2**30:.1f} GiB each" if device.memory_bytes else ""
        how = f"{device.kernels} kernels, " + ("interpreted on the CPU" if device.interpreted else "compiled")
        yield f"device_check: {device.count} x {device.kind} ({device.platform}){memory}"
        yield f"  {how}; JAX {device.jax}, jaxlib {device.jaxlib}, {device.driver}"
        yield ""
        yield from self._contact()
        if self.speeds and not device.interpreted:
            yield from _speeds(self.speeds)
        if self.steps and not device.interpreted:
            yield from _steps(self.steps)
        if self.tuned:
            yield "tiles, with the duration of a few steps in ms: of the fastest, and of the formula's choice"
            for each in self.tuned:
                fields = ", ".join(f"{name}={value}" for name, value in each.tile.items())
                yield f"  {each.key}: {fields}"
                yield f"    {1e3 * each.seconds[0]:.3f}, {1e3 * each.seconds[1]:.3f}; {each.tried} tiles were right"
            yield ""
        failures = len(self.failures)
        yield f"verdict: {failures} calls failed" if failures else "verdict: all results are right"

    def _contact(self) -> Iterator[str]:
        by_op: dict[str, Counter[str]] = {}
        for outcome in self.outcomes:
            by_op.setdefault(outcome.op, Counter())[outcome.status] += 1
        yield f"{'results':<18}{'passed':>8}{'failed':>8}{'crashed':>9}{'timed out':>11}{'no kernel':>11}"
        for op, counts in by_op.items():
            passed, failed, crashed, late = (counts[each] for each in ("passed", *_FAILED))
            yield f"  {op:<16}{passed:>8}{failed:>8}{crashed:>9}{late:>11}{counts['unsupported']:>11}"
        for outcome in self.failures:
            detail = " ".join(outcome.detail.split())[:_MAX_DETAIL]
            yield f"  {outcome.status}: {outcome.model}: {outcome.op}, {outcome.name}: {detail}"
        reasons = ((outcome.op, outcome.detail) for outcome in self.outcomes if outcome.status == "unsupported")
        for op, reason in dict.fromkeys(reasons):
            yield f"  no kernel: {op}: {reason}"
        yield ""


def _speeds(speeds: Sequence[Speed]) -> Iterator[str]:
    yield f"{'kernels':<58}{'us':>10}{'GB/s':>9}{'TFLOP/s':>9}{'roofline':>10}"
    for speed in speeds:
        rate, flops = speed.num_bytes / speed.seconds / 1e9, speed.num_flops / speed.seconds / 1e12
        name = f"{speed.op}: {speed.name}"
        yield f"  {name:<56}{1e6 * speed.seconds:>10.1f}{rate:>9.0f}{flops:>9.1f}{_percent(speed.share)}"
    yield ""


def _steps(steps: Sequence[StepSpeed]) -> Iterator[str]:
    yield f"{'steps':<34}{'ms':>9}{'kernels':>9}{'XLA':>9}{'idle':>9}{'roofline':>10}"
    for step in steps:
        name = f"{step.rows} rows of {step.context} keys"
        parts = (step.kernel_seconds, step.xla_seconds, step.idle_seconds)
        columns = "".join(f"{'?':>9}" if part is None else f"{1e3 * part:>9.2f}" for part in parts)
        yield f"  {name:<32}{1e3 * step.seconds:>9.2f}{columns}{_percent(step.share)}"
    yield ""


def _percent(share: float | None) -> str:
    if share is None:
        return f"{'?':>10}"
    return f"{share:>10.0%}" + (" slow" if share < _SLOW else "")


def make_report(events: Sequence[Event]) -> Report:
    """Sort events into a report."""
    device = next(event for event in events if isinstance(event, DeviceInfo))
    return Report(
        device=device,
        outcomes=[event for event in events if isinstance(event, Outcome)],
        speeds=[event for event in events if isinstance(event, Speed)],
        steps=[event for event in events if isinstance(event, StepSpeed)],
        tuned=[event for event in events if isinstance(event, Tuned)],
    )
