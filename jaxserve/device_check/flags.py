"""The flags of `python -m jaxserve.device_check`, which its child processes are given, too."""

import argparse
from collections.abc import Sequence

import msgspec

from jaxserve.arguments import device_flags, memory_flags, model_flags, step_settings
from jaxserve.config import EngineConfig

_DESCRIPTION = """Checks the kernels on the devices at hand: right results, speed, and with --tune the fastest tiles.

Every call runs in a child process with a time limit, since a kernel that is wrong may never return or may end its
process. Without TPU or GPU the kernels are interpreted.
"""


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxserve.device_check",
        description=_DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check = parser.add_argument_group("check")
    check.add_argument("--quick", action="store_true", help="few calls and few sizes, meant to take 3 minutes")
    check.add_argument("--tune", action="store_true", help="measure tiles, and write a table that the server reads")
    check.add_argument("--repeats", type=int, default=100, help="repetitions of a call, which must give equal bits")
    check.add_argument("--timeout", type=float, default=120.0, help="time limit of a call, in seconds")
    check.add_argument("--json", default="device_check.json", metavar="FILE", help="where to write the results")
    check.add_argument(
        "--interpret",
        choices=["gpu", "tpu"],
        help="interpret these kernels on the CPU; default without TPU or GPU: gpu",
    )
    model_flags(parser.add_argument_group("model; without --model-path, small models with every variant"))
    memory_flags(parser.add_argument_group("memory and batching"))
    device_flags(parser.add_argument_group("devices"))
    # For child processes.
    parser.add_argument("--phase", choices=["contact", "speed", "steps", "tune"], help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for flag in ("repeats", "timeout"):
        if getattr(args, flag) < 0:
            parser.error(f"--{flag} must not be negative, got {getattr(args, flag)}")
    return args


def engine_config(args: argparse.Namespace, name: str) -> EngineConfig:
    """Return the settings with which a model of this name is laid out."""
    return msgspec.structs.replace(EngineConfig(**step_settings(args)), model_path=name)
