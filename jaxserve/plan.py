"""`python -m jaxserve.plan`: does a model fit devices that are not here, and what could they do with it at best.

Only the model's `config.json` is needed. The step's real programs, kernels included, are compiled for the target by its
own compiler.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

import msgspec

from jaxserve.config import EngineConfig
from jaxserve.errors import ExitCode, LaunchError
from jaxserve.model_source import find_config
from jaxserve.targets import Target, parse_target, prepare_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Plan; returns 0 if the model fits, 1 if it does not, 2 if that cannot be told."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        target = parse_target(args.target)
        hf_config = find_config(args.model_path, args.revision, args.download_dir)
        prepare_environment(target)
        from jaxserve.planning import make_plan  # noqa: PLC0415  (jax reads the environment when it is imported)

        report = make_plan(_engine_config(args, target), hf_config, target)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(ExitCode.BAD_CONFIG)
    print(msgspec.json.format(msgspec.json.encode(report)).decode() if args.json else report.table())
    return 0 if report.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxserve.plan", description=__doc__)
    parser.add_argument("--model-path", required=True, help="folder with a config.json, Hugging Face id, or .gguf file")
    parser.add_argument(
        "--target", required=True, help="v5e:2x2, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1, h100:8, h200:1, cpu:8"
    )
    parser.add_argument("--tp-size", "--tp", type=int, help="devices of a copy; all that --dp leaves if unset")
    parser.add_argument("--dp-size", "--dp", type=int, default=1, help="copies of the model")
    parser.add_argument("--context-length", type=int, help="the model's own if unset")
    parser.add_argument("--max-running-requests", type=int)
    parser.add_argument("--chunked-prefill-size", type=int)
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--mem-fraction-static", type=float)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "bf16", "bfloat16", "fp8_e4m3"], default="auto")
    parser.add_argument("--attention-backend", choices=["auto", "tpu", "gpu", "xla"], default="auto")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--download-dir", help="cache folder for Hugging Face downloads")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="warning")
    return parser


def _engine_config(args: argparse.Namespace, target: Target) -> EngineConfig:
    if not 1 <= args.dp_size <= target.num_devices:
        raise LaunchError(
            f"--dp-size must be between 1 and the target's {target.num_devices} devices, got {args.dp_size}"
        )
    tp_size = args.tp_size if args.tp_size is not None else target.num_devices // args.dp_size
    if not 1 <= tp_size * args.dp_size <= target.num_devices:
        raise LaunchError(
            f"--tp-size {tp_size} and --dp-size {args.dp_size} need {tp_size * args.dp_size} devices, "
            f"--target {target.text} has {target.num_devices}"
        )
    return EngineConfig(
        model_path=args.model_path,
        tp_size=tp_size,
        dp_size=args.dp_size,
        dtype=args.dtype,
        context_length=args.context_length,
        max_running_requests=args.max_running_requests,
        chunked_prefill_size=args.chunked_prefill_size,
        page_size=args.page_size,
        mem_fraction_static=args.mem_fraction_static,
        kv_cache_dtype=args.kv_cache_dtype,
        attention_backend=args.attention_backend,
    )


if __name__ == "__main__":
    sys.exit(main())
