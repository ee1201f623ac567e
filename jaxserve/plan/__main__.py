"""`python -m jaxserve.plan`: checks whether a model fits devices that are not present, and bounds its speed on them.

Only the model's `config.json` is needed. The step's real programs, kernels included, are compiled by the target's own
compiler.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

import msgspec

from jaxserve.arguments import device_flags, lora_slot_flags, lora_slots, memory_flags, model_flags, step_settings
from jaxserve.config import EngineConfig, LoraConfig
from jaxserve.errors import ExitCode, LaunchError
from jaxserve.loading.hub import find_config
from jaxserve.plan.targets import Target, parse_target, prepare_environment

_TP_SIZE = "Without --tp-size, a replica takes all devices that --dp-size leaves it."


def main(argv: Sequence[str] | None = None) -> int:
    """Print a plan; return 0 if the model fits, 1 if it does not, 2 if that is unknown."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.model_path:
        parser.error("--model-path is required")
    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        target = parse_target(args.target)
        hf_config = find_config(args.model_path, args.revision, args.download_dir)
        prepare_environment(target)
        from jaxserve.plan.compile import make_plan  # noqa: PLC0415  (jax reads the environment when it is imported)

        report = make_plan(_engine_config(args, target), hf_config, target)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(ExitCode.BAD_CONFIG)
    print(msgspec.json.format(msgspec.json.encode(report)).decode() if args.json else report.table())
    return 0 if report.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxserve.plan", description=f"{__doc__}\n{_TP_SIZE}", allow_abbrev=False
    )
    parser.add_argument(
        "--target", required=True, help="v5e:2x2, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1, h100:8, h200:1, cpu:8"
    )
    model_flags(parser.add_argument_group("model"))
    memory_flags(parser.add_argument_group("memory and batching"))
    device_flags(parser.add_argument_group("devices"))
    lora_slot_flags(parser.add_argument_group("LoRA"))
    parser.set_defaults(tp_size=None)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="warning")
    return parser


def _engine_config(args: argparse.Namespace, target: Target) -> EngineConfig:
    if not 1 <= args.dp_size <= target.num_devices:
        raise LaunchError(
            f"--dp-size must be between 1 and the target's {target.num_devices} devices, got {args.dp_size}"
        )
    replicas = 1 if args.enable_dp_attention else args.dp_size  # with DP attention, `--tp-size` covers all replicas
    if args.tp_size is None:
        args.tp_size = target.num_devices // replicas
    if not 1 <= args.tp_size * replicas <= target.num_devices:
        raise LaunchError(
            f"--tp-size {args.tp_size} and --dp-size {args.dp_size} need {args.tp_size * replicas} devices, "
            f"--target {target.text} has {target.num_devices}"
        )
    if not args.enable_lora and (args.max_lora_rank is not None or args.lora_target_modules is not None):
        raise LaunchError("--max-lora-rank and --lora-target-modules need --enable-lora")
    lora = LoraConfig(**lora_slots(args)) if args.enable_lora else None
    return EngineConfig(**step_settings(args), lora=lora)


if __name__ == "__main__":
    sys.exit(main())
