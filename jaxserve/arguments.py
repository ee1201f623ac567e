"""Launch flags, with SGLang's names and meanings, and the `--config` file. Flags win over the file."""

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import yaml

from jaxserve.config import EngineConfig, LoraConfig
from jaxserve.errors import LaunchError
from jaxserve.loading.hub import cache_folder
from jaxserve.parsing.reasoning.registry import REASONING_FORMATS
from jaxserve.parsing.tool_calls.registry import TOOL_CALL_FORMATS
from jaxserve.text.completion_template import COMPLETION_TEMPLATES

# Flags that are told to nobody.
SECRETS = ("api_key", "admin_api_key")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Everything the launcher was told.

    Attributes:
        args: the parsed flags.
        engine: what the engine process is told; `model_path` is still the user's name for the model.
    """

    args: argparse.Namespace
    engine: EngineConfig


class _LoraPath(msgspec.Struct, forbid_unknown_fields=True):
    """An adapter of `--lora-paths` as JSON."""

    lora_name: str
    lora_path: str
    pinned: bool = False


def build_parser() -> argparse.ArgumentParser:
    """All flags, in groups."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxserve.launch",
        description="Serve a language model over the OpenAI API.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model_flags(model)
    _text_flags(model)
    _server_flags(parser.add_argument_group("server"))
    _output_flags(parser.add_argument_group("output"))
    memory = parser.add_argument_group("memory and batching")
    memory_flags(memory)
    _queue_flags(memory)
    devices = parser.add_argument_group("devices")
    device_flags(devices)
    _host_flags(devices)
    lora = parser.add_argument_group("LoRA")
    lora_slot_flags(lora)
    _lora_flags(lora)
    _log_flags(parser.add_argument_group("logs and metrics"))
    return parser


def model_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    """Which model, and in which precision."""
    group.add_argument(
        "--model-path", "--model", dest="model_path", help="Hugging Face id, model folder, .gguf file, or 'demo'"
    )
    group.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of weights and activations; auto is the checkpoint's, with bfloat16 for float16",
    )
    group.add_argument(
        "--context-length", type=int, help="tokens of prompt and output together; the model's own if unset"
    )
    group.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    group.add_argument("--download-dir", help="cache folder for Hugging Face downloads")


def _text_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    group.add_argument("--tokenizer-path", help="folder or .gguf file of the tokenizer; the model's own if unset")
    group.add_argument(
        "--chat-template", help="a Jinja file, a template as text, or 'chatml'; the model's own if unset"
    )
    group.add_argument(
        "--sampling-defaults",
        choices=["model", "openai"],
        default="model",
        help="where sampling parameters come from that a request does not set: the model's generation_config.json or "
        "GGUF keys, or OpenAI's defaults",
    )
    group.add_argument(
        "--preferred-sampling-params",
        type=_json_object,
        help="JSON object of sampling parameters for requests that do not set them; wins over --sampling-defaults",
    )
    group.add_argument("--random-seed", type=int, help="makes the seeds of requests that bring none reproducible")
    group.add_argument("--config", help="YAML file of flags, names without the dashes; flags on the command line win")


def _json_object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, {error}") from None


def _server_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    group.add_argument("--host", default="127.0.0.1", help="address to bind")
    group.add_argument("--port", type=int, default=30000, help="port to bind")
    group.add_argument("--served-model-name", help="name in the API; --model-path if unset")
    group.add_argument("--api-key", help="clients must send it; JAXSERVE_API_KEY in the environment if unset")
    group.add_argument(
        "--admin-api-key",
        help="wanted, instead of the API key, by routes that change the server: LoRA, flush_cache, abort_request; "
        "JAXSERVE_ADMIN_API_KEY in the environment if unset",
    )
    group.add_argument(
        "--strict-params",
        action="store_true",
        help="refuse requests with fields that are not known; else they are logged",
    )
    group.add_argument(
        "--skip-server-warmup", action="store_true", help="do not generate a token before reporting ready"
    )
    group.add_argument(
        "--drain-timeout", type=float, default=30.0, help="seconds that running requests get after SIGTERM"
    )


def _output_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    group.add_argument(
        "--reasoning-parser",
        type=str.lower,
        choices=["auto", *REASONING_FORMATS],
        help="tells thinking from answers; auto goes by the chat template. Thinking stays in the content if unset",
    )
    group.add_argument(
        "--tool-call-parser",
        type=str.lower,
        choices=["auto", *TOOL_CALL_FORMATS],
        default="auto",
        help="finds tool calls in answers to requests with tools; auto goes by the chat template",
    )
    group.add_argument(
        "--completion-template",
        help=f"of requests with a suffix: {', '.join(COMPLETION_TEMPLATES)}, or a text with {{prompt}} and {{suffix}}",
    )
    group.add_argument(
        "--grammar-backend",
        choices=["llguidance", "none"],
        default="llguidance",
        help="enforces schemas, patterns and rules; none refuses them",
    )
    group.add_argument(
        "--constrained-json-disable-any-whitespace", action="store_true", help="no white space in constrained JSON"
    )
    group.add_argument(
        "--constrained-json-whitespace-pattern", help="what may stand between the tokens of constrained JSON, a regex"
    )


def memory_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    """Limits of a step and of the cache."""
    group.add_argument(
        "--mem-fraction-static",
        type=float,
        help="share of the memory left after the weights for the key/value pool; 0.88 if unset, 512 MiB on CPU",
    )
    group.add_argument("--max-total-tokens", type=int, help="size of the key/value pool in tokens; overrides the above")
    group.add_argument(
        "--page-size",
        type=int,
        help="tokens per page, a power of two; if unset 64 on CPU, 128 elsewhere, and on TPU 256 for long contexts",
    )
    group.add_argument(
        "--max-running-requests", type=int, help="choices that run at once; 32 on CPU and 256 elsewhere if unset"
    )
    group.add_argument(
        "--chunked-prefill-size", type=int, help="tokens of one step; 512 on CPU and 2048 elsewhere if unset"
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=["auto", "bf16", "bfloat16", "fp8_e4m3", "int8"],
        default="auto",
        help="of cached keys and values; auto is that of the activations",
    )
    group.add_argument(
        "--quantization",
        choices=["int8", "fp8", "int4", "awq", "gptq", "compressed-tensors", "mxfp4"],
        help="int8, fp8 and int4 quantise a plain checkpoint's linear maps while it is loaded (a factor for each row, "
        "of int4 for each 32 inputs); any other must be what the checkpoint is. Unset: as the checkpoint is",
    )


def _queue_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    group.add_argument(
        "--max-queued-requests", type=int, help="choices that may wait; more are refused with 429. No limit if unset"
    )
    group.add_argument(
        "--schedule-policy",
        choices=["fcfs", "lpm", "priority"],
        default="fcfs",
        help="order of the queue: arrival, longest cached prefix, or the request's priority, higher first",
    )
    group.add_argument("--disable-radix-cache", action="store_true", help="do not reuse computed prefixes")


def device_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    """How a step is split and computed."""
    group.add_argument("--tp-size", "--tp", type=int, default=1, help="devices that a model is split over")
    group.add_argument(
        "--dp-size", "--dp", type=int, default=1, help="copies of the model, each with its own rows and pool"
    )
    group.add_argument(
        "--ep-size",
        "--ep",
        "--expert-parallel-size",
        type=int,
        default=1,
        help="groups of those devices that have experts of their own; the devices of a group share each expert",
    )
    group.add_argument(
        "--enable-dp-attention",
        action="store_true",
        help="--tp-size is all devices: --dp-size copies of attention over them, and one set of experts over all",
    )
    group.add_argument(
        "--attention-backend",
        choices=["auto", "tpu", "gpu", "xla"],
        default="auto",
        help="auto is the device's own kernel, or where it cannot serve the model the portable xla, with a warning",
    )
    group.add_argument(
        "--enable-deterministic-inference",
        action="store_true",
        help="make logits independent of other requests; slower",
    )


def _host_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    group.add_argument("--nnodes", type=int, default=1, help="hosts that run the model together")
    group.add_argument("--node-rank", type=int, default=0, help="number of this host; host 0 serves the API")
    group.add_argument("--dist-init-addr", help="host:port of host 0 that the others go to")
    group.add_argument("--dist-timeout", type=float, default=300.0, help="seconds that hosts wait for each other")
    group.add_argument(
        "--compilation-cache-dir",
        help="where compiled programs are kept; 'none' keeps none. Below the cache folder if unset",
    )


def lora_slot_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    """What shapes the adapters' part of a step."""
    group.add_argument(
        "--enable-lora", action="store_true", help="take requests with LoRA adapters; on where --lora-paths are given"
    )
    group.add_argument(
        "--max-loras-per-batch", type=int, default=8, help="adapters in one step, the base model counted as one"
    )
    group.add_argument("--max-lora-rank", type=int, help="of any adapter; that of the widest one loaded if unset")
    group.add_argument(
        "--lora-target-modules",
        nargs="*",
        help="modules that adapters may change, such as q_proj, 'all-linear' or 'all'; those that --lora-paths change "
        "if unset",
    )


def _lora_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    group.add_argument(
        "--lora-paths",
        nargs="*",
        default=[],
        help="adapters to load: a folder or Hugging Face id, which is its name, too, or name=path, or JSON with "
        "lora_name, lora_path and pinned",
    )
    group.add_argument(
        "--max-loaded-loras",
        type=int,
        help="adapters in memory; the one used least recently makes room, and is read again when asked for. "
        "No limit if unset",
    )
    group.add_argument(
        "--lora-root",
        help="folder whose adapters /load_lora_adapter may load; none may be loaded while serving if unset",
    )
    group.add_argument(
        "--lora-eviction-policy",
        choices=["lru", "fifo"],
        default="lru",
        help="which idle adapter gives up its place on the device: least recently used, or first in",
    )
    group.add_argument(
        "--merge-lora",
        help="folder or Hugging Face id of an adapter, or name=path: it is added to the weights, and the model is "
        "served under its name",
    )


def _log_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    group.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], default="info", help="of all processes"
    )
    group.add_argument("--log-requests", action="store_true", help="one line per request, without its text")
    group.add_argument(
        "--enable-metrics",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="serve Prometheus metrics at /metrics",
    )


def parse_arguments(argv: Sequence[str]) -> LaunchConfig:
    """Read flags and the config file.

    Raises:
        LaunchError: contradictory or impossible values, or a bad config file.
        SystemExit: unknown flags, `--help`.
    """
    parser = build_parser()
    path = parser.parse_known_args(argv)[0].config
    if path is not None:
        _apply_config_file(parser, Path(path))
    args = parser.parse_args(argv)
    if not args.model_path:
        parser.error("--model-path is required")
    if not 0 <= args.port <= 65535:
        raise LaunchError(f"--port must be between 0 and 65535, got {args.port}")
    if args.drain_timeout < 0:
        raise LaunchError(f"--drain-timeout must not be negative, got {args.drain_timeout}")
    for name in SECRETS:
        if getattr(args, name) is None:
            setattr(args, name, os.environ.get(f"JAXSERVE_{name.upper()}") or None)
        elif not getattr(args, name):
            raise LaunchError(f"--{name.replace('_', '-')} must not be empty")
    return LaunchConfig(args=args, engine=_engine_config(args))


def _devices(args: argparse.Namespace) -> dict[str, Any]:
    """How copies and experts lie on devices. As in SGLang, with `--enable-dp-attention` `--tp-size` counts all."""
    tp_size, dp_size, ep_size = args.tp_size, args.dp_size, args.ep_size
    if not args.enable_dp_attention or dp_size < 1:
        return {"tp_size": tp_size, "dp_size": dp_size, "ep_size": ep_size}
    ep_size = tp_size if ep_size == 1 else ep_size  # each device has experts of its own
    for flag, size in (("--tp-size", tp_size), ("--ep-size", ep_size)):
        if size % dp_size:
            raise LaunchError(f"--enable-dp-attention: --dp-size {dp_size} does not divide {flag} {size}")
    return {"tp_size": tp_size // dp_size, "dp_size": dp_size, "ep_size": ep_size // dp_size, "dp_attention": True}


def step_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `EngineConfig` that `model_flags`, `memory_flags` and `device_flags` set."""
    return {
        "model_path": args.model_path,
        "dtype": args.dtype,
        "context_length": args.context_length,
        **_devices(args),
        "page_size": args.page_size,
        "mem_fraction_static": args.mem_fraction_static,
        "max_total_tokens": args.max_total_tokens,
        "max_running_requests": args.max_running_requests,
        "chunked_prefill_size": args.chunked_prefill_size,
        "kv_cache_dtype": args.kv_cache_dtype,
        "quantization": args.quantization,
        "attention_backend": args.attention_backend,
        "deterministic": args.enable_deterministic_inference,
    }


def lora_slots(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `LoraConfig` that `lora_slot_flags` set."""
    return {
        "max_loras_per_batch": args.max_loras_per_batch,
        "max_rank": args.max_lora_rank,
        "target_modules": None if args.lora_target_modules is None else tuple(args.lora_target_modules),
    }


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        **step_settings(args),
        max_queued_requests=args.max_queued_requests,
        schedule_policy=args.schedule_policy,
        prefix_caching=not args.disable_radix_cache,
        nnodes=args.nnodes,
        node_rank=args.node_rank,
        dist_init_addr=args.dist_init_addr,
        dist_timeout_s=args.dist_timeout,
        compilation_cache_dir=_compilation_cache(args),
        log_level=args.log_level,
        lora=_lora_config(args),
    )


def _lora_config(args: argparse.Namespace) -> LoraConfig | None:
    """Adapters as the user named them; the launcher finds their folders."""
    if not (args.enable_lora or args.lora_paths):
        for name in ("max_lora_rank", "lora_target_modules", "max_loaded_loras", "lora_root"):
            if getattr(args, name) is not None:
                raise LaunchError(f"--{name.replace('_', '-')} needs --enable-lora or --lora-paths")
        return None
    if args.node_rank == 0 and args.lora_root is not None and not Path(args.lora_root).is_dir():
        raise LaunchError(f"--lora-root {args.lora_root}: no such folder")
    adapters = [_named_adapter(text) for text in args.lora_paths]
    paths = {adapter.lora_name: adapter.lora_path for adapter in adapters}
    if len(paths) < len(adapters):
        [(name, _)] = Counter(adapter.lora_name for adapter in adapters).most_common(1)
        raise LaunchError(f"--lora-paths: two adapters are called {name!r}")
    return LoraConfig(
        **lora_slots(args),
        paths=paths,
        pinned=tuple(adapter.lora_name for adapter in adapters if adapter.pinned),
        max_loaded=args.max_loaded_loras,
        eviction_policy=args.lora_eviction_policy,
    )


def _named_adapter(text: str) -> _LoraPath:
    if text.lstrip().startswith("{"):
        try:
            return msgspec.json.decode(text, type=_LoraPath)
        except msgspec.DecodeError as error:
            raise LaunchError(f"--lora-paths {text}: {error}") from None
    name, separator, path = text.partition("=")
    return _LoraPath(name, path if separator else name)


def _compilation_cache(args: argparse.Namespace) -> str | None:
    """One private folder per model, settings and versions: what is in it gets executed."""
    if args.compilation_cache_dir == "none":
        return None
    key = [metadata.version("jax"), metadata.version("jaxlib"), args.model_path, args.dtype, str(args.tp_size)]
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    base = Path(args.compilation_cache_dir) if args.compilation_cache_dir else cache_folder() / "compiled"
    folder = base / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return str(folder)


def _apply_config_file(parser: argparse.ArgumentParser, path: Path) -> None:
    """Make the file's values the parser's defaults."""
    try:
        values: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise LaunchError(f"--config {path}: {error}") from None
    if not isinstance(values, dict):
        raise LaunchError(f"--config {path}: expected a mapping of flags")
    actions = {option.lstrip("-"): action for action in parser._actions for option in action.option_strings}  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    for key, value in values.items():
        action = actions.get(str(key).replace("_", "-"))
        if action is None or action.dest in ("help", "config"):
            raise LaunchError(f"--config {path}: unknown flag {key!r}")
        if action.choices is not None and value not in action.choices:
            raise LaunchError(f"--config {path}: {key} must be one of {', '.join(action.choices)}, got {value!r}")
        if isinstance(action.default, bool) or action.nargs == 0:
            converted: Any = value != str(key).startswith("no")
            if not isinstance(value, bool):
                raise LaunchError(f"--config {path}: {key} must be true or false, got {value!r}")
        else:
            try:
                convert: Any = action.type or str
                if action.nargs == "*":
                    converted = [convert(item) for item in (value if isinstance(value, list) else [value])]
                else:
                    converted = None if value is None else convert(value)
            except (TypeError, ValueError):
                raise LaunchError(f"--config {path}: {key} has a bad value {value!r}") from None
        parser.set_defaults(**{action.dest: converted})
