"""`python -m jaxserve.device_check`: the first minutes on a device."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from jaxserve.device_check.children import ChildFailedError, run_children, worker_command
from jaxserve.device_check.events import Begin, DeviceInfo, Event, Failure, Outcome
from jaxserve.device_check.flags import parse_flags
from jaxserve.device_check.report import Report, make_report
from jaxserve.errors import ExitCode, LaunchError
from jaxserve.layout.device_results import DeviceResults, current_versions, read_results, write_results
from jaxserve.loading.hub import find_config

# A phase's tasks take longer than single calls: a model's programs are compiled, or many tiles.
_LONG_TASKS = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; return 0 if all results are right, 1 if some are not, 2 if it could not run."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_flags(argv)
    try:
        if args.model_path:
            find_config(args.model_path, args.revision, args.download_dir)
        events = list(_events(argv, args.timeout, steps=bool(args.model_path), tune=args.tune))
    except (LaunchError, ChildFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return int(ExitCode.BAD_CONFIG)
    report = make_report(events)
    Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    print(report.text())
    print(f"JSON: {args.json}")
    if not report.device.interpreted:
        print(f"for the server: {write_results(_results(report))}")
    return 1 if report.failures else 0


def _events(argv: Sequence[str], timeout_s: float, *, steps: bool, tune: bool) -> Iterator[Event]:
    """Yield the events of all phases, and show the progress."""
    phases = [("contact", timeout_s), ("speed", timeout_s)]
    phases += [("steps", _LONG_TASKS * timeout_s)] if steps else []
    phases += [("tune", _LONG_TASKS * timeout_s)] if tune else []
    for phase, limit in phases:
        for event in run_children(worker_command(argv, phase), limit):
            match event:
                case Failure(message):
                    raise LaunchError(message)
                case Begin(_, label):
                    print(f"{label} ...", end="", file=sys.stderr, flush=True)
                case Outcome():
                    print(f" {event.status}", file=sys.stderr, flush=True)
                case DeviceInfo():
                    print(f"{phase}:", file=sys.stderr, flush=True)
                case _:
                    print(" done", file=sys.stderr, flush=True)
            yield event


def _results(report: Report) -> DeviceResults:
    """Return what the server reads; tiles that were found before and not now stay."""
    failed: dict[str, list[str]] = {}
    for outcome in report.failures:
        failed.setdefault(outcome.op, []).append(f"{outcome.model}, {outcome.name}: {outcome.status}")
    known = read_results(report.device.kind).tiles
    tiles = {each.key: each.tile for each in report.tuned}
    return DeviceResults(
        device_kind=report.device.kind, versions=current_versions(), failed=failed, tiles=known | tiles
    )


if __name__ == "__main__":
    sys.exit(main())
