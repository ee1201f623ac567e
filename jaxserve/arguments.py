"""Launch flags, with SGLang's names and meanings, and the `--config` file, which flags override."""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from jaxserve.config import EngineConfig, HttpConfig, LoraConfig, ModelFiles, OutputConfig, ServeConfig
from jaxserve.errors import LaunchError
from jaxserve.loading.hub import cache_folder
from jaxserve.parsing.reasoning.registry import REASONING_FORMATS
from jaxserve.parsing.tool_calls.registry import TOOL_CALL_FORMATS
from jaxserve.text.completion_template import COMPLETION_TEMPLATES

_SECRETS = ("api_key", "admin_api_key")


class _LoraPath(msgspec.Struct, forbid_unknown_fields=True):
    """An adapter in `--lora-paths` that is given as JSON."""

    lora_name: str
    lora_path: str
    pinned: bool = False


def build_parser() -> argparse.ArgumentParser:
    """Return a parser of all flags, in groups."""
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
    """Add the flags for the model and its precision."""
    group.add_argument(
        "--model-path", "--model", dest="model_path", help="Hugging Face id, model folder, .gguf file, or 'demo'"
    )
    group.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="dtype of weights and activations; auto is the checkpoint's dtype, and bfloat16 instead of float16",
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
        help="source of the sampling parameters that a request does not set: the model's generation_config.json or "
        "GGUF keys, or OpenAI's defaults",
    )
    group.add_argument(
        "--preferred-sampling-params",
        type=_json_object,
        help="JSON object of sampling parameters for requests that do not set them; wins over --sampling-defaults",
    )
    group.add_argument("--random-seed", type=int, help="makes the seeds of requests that set none reproducible")
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
    group.add_argument("--api-key", help="key that clients must send; JAXSERVE_API_KEY in the environment if unset")
    group.add_argument(
        "--admin-api-key",
        help="key for the routes that change the server (LoRA, flush_cache, abort_request), which then do "
        "not accept the API key; JAXSERVE_ADMIN_API_KEY in the environment if unset",
    )
    group.add_argument(
        "--strict-params",
        action="store_true",
        help="refuse requests with unknown fields, which are logged otherwise",
    )
    group.add_argument("--skip-server-warmup", action="store_true", help="report ready without a warm-up request")
    group.add_argument(
        "--drain-timeout", type=float, default=30.0, help="seconds that running requests get after SIGTERM"
    )


def _output_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    group.add_argument(
        "--reasoning-parser",
        type=str.lower,
        choices=["auto", *REASONING_FORMATS],
        help="separates reasoning from the answer; auto detects the format from the chat template. Reasoning stays "
        "in the content if unset",
    )
    group.add_argument(
        "--tool-call-parser",
        type=str.lower,
        choices=["auto", *TOOL_CALL_FORMATS],
        default="auto",
        help="finds tool calls in answers to requests with tools; auto detects the format from the chat template",
    )
    group.add_argument(
        "--completion-template",
        help="template of completion requests with a suffix: "
        f"{', '.join(COMPLETION_TEMPLATES)}, or a text with {{prompt}} and {{suffix}}",
    )
    group.add_argument(
        "--grammar-backend",
        choices=["llguidance", "none"],
        default="llguidance",
        help="enforces structured outputs; none refuses requests for them",
    )
    group.add_argument(
        "--constrained-json-disable-any-whitespace", action="store_true", help="no white space in constrained JSON"
    )
    group.add_argument(
        "--constrained-json-whitespace-pattern",
        help="regular expression of the white space between the tokens of constrained JSON",
    )


def memory_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    """Add the flags for the limits of a step and of the cache."""
    group.add_argument(
        "--mem-fraction-static",
        type=float,
        help="fraction of the memory left after the weights for the key/value pool; 0.88 if unset, 512 MiB on CPU",
    )
    group.add_argument(
        "--max-total-tokens", type=int, help="size of the key/value pool in tokens; overrides --mem-fraction-static"
    )
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
        help="dtype of cached keys and values; auto is the dtype of the activations",
    )
    group.add_argument(
        "--quantization",
        choices=[
            "int8", "fp8", "int4", "w8a8_int8", "w8a8_fp8", "awq", "gptq", "compressed-tensors", "mxfp4",
        ],
        help="int8, fp8 and int4 quantise the linear layers of a plain checkpoint while it is loaded (one scale per "
        "row, for int4 per 32 inputs), w8a8_int8 and w8a8_fp8 also the activations of prompts; any other value must be "
        "the checkpoint's own format, which is used if unset",
    )  # fmt: skip
    group.add_argument(
        "--activation-quantization",
        choices=["auto", "none"],
        default="auto",
        help="auto quantises the activations of steps of more than 128 tokens where weights were made for it and the "
        "device multiplies 8-bit elements faster; none never does (default: auto)",
    )


def _queue_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    group.add_argument(
        "--max-queued-requests",
        type=int,
        help="choices that may wait; further requests are refused with 429. No limit if unset",
    )
    group.add_argument(
        "--schedule-policy",
        choices=["fcfs", "lpm", "priority"],
        default="fcfs",
        help="order of the queue: arrival, longest cached prefix, or the request's priority, higher first",
    )
    group.add_argument("--disable-radix-cache", action="store_true", help="do not reuse computed prefixes")


def device_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    """Add the flags for how a step is split over devices and computed."""
    group.add_argument("--tp-size", "--tp", type=int, default=1, help="devices that a model is split over")
    group.add_argument(
        "--dp-size",
        "--dp",
        type=int,
        default=1,
        help="replicas of the model, each with its own requests and key/value pool",
    )
    group.add_argument(
        "--ep-size",
        "--ep",
        "--expert-parallel-size",
        type=int,
        help="groups that the experts are divided among; the devices of a group split each expert (default: 1, on TPU "
        "more if the shards of an expert would not fill whole rows of 128 elements, or 256 if quantised in blocks)",
    )
    group.add_argument(
        "--enable-dp-attention",
        action="store_true",
        help="as in SGLang: --tp-size counts all devices, --dp-size replicas of attention share them, and one set of "
        "experts is sharded over all devices",
    )
    group.add_argument(
        "--attention-backend",
        choices=["auto", "tpu", "gpu", "xla"],
        default="auto",
        help="auto is the device's own kernel, or, with a warning, the portable xla if the kernel cannot serve the "
        "model",
    )
    group.add_argument(
        "--enable-deterministic-inference",
        action="store_true",
        help="make logits independent of other requests; slower",
    )


def _host_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    group.add_argument("--nnodes", type=int, default=1, help="hosts that run the model together")
    group.add_argument("--node-rank", type=int, default=0, help="rank of this host; host 0 serves the API")
    group.add_argument("--dist-init-addr", help="host:port of host 0, which the other hosts connect to")
    group.add_argument("--dist-timeout", type=float, default=300.0, help="seconds that hosts wait for each other")
    group.add_argument(
        "--compilation-cache-dir",
        help="folder of compiled programs, 'none' for none; a folder in the user's cache if unset",
    )


def lora_slot_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    """Add the flags for the shapes of the LoRA part of a step."""
    group.add_argument("--enable-lora", action="store_true", help="serve LoRA adapters; implied by --lora-paths")
    group.add_argument(
        "--max-loras-per-batch", type=int, default=8, help="adapters in one batch, counting the base model as one"
    )
    group.add_argument(
        "--max-lora-rank", type=int, help="largest rank of an adapter; the largest of --lora-paths if unset"
    )
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
        help="adapters to load: a folder or Hugging Face id, also used as its name, or name=path, or JSON with "
        "lora_name, lora_path and pinned",
    )
    group.add_argument(
        "--max-loaded-loras",
        type=int,
        help="adapters in host memory; the least recently used one is evicted, and read again on demand. "
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
        help="which idle adapter is evicted from the device: the least recently used, or the first loaded",
    )
    group.add_argument(
        "--merge-lora",
        help="adapter to add to the weights: a folder or Hugging Face id, or name=path; the model is served under "
        "its name",
    )


def _log_flags(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    group.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], default="info", help="log level of all processes"
    )
    group.add_argument("--log-requests", action="store_true", help="one line per request, without its text")
    group.add_argument(
        "--enable-metrics",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="serve Prometheus metrics at /metrics",
    )


def parse_arguments(argv: Sequence[str]) -> ServeConfig:
    """Parse the flags and the config file.

    Only what concerns several flags, or the text of one, is checked here. The ranges of values are checked by the
    configs, in `jaxserve.config`.

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
    return ServeConfig(
        engine=_engine_config(args),
        files=ModelFiles(
            model_path=args.model_path,
            revision=args.revision,
            download_dir=args.download_dir,
            tokenizer_path=args.tokenizer_path,
            chat_template=args.chat_template,
            merge_lora=args.merge_lora,
        ),
        http=_http_config(args),
        output=_output_config(args),
        lora_root=args.lora_root,
        log_level=args.log_level,
        flags={name: value for name, value in vars(args).items() if name not in _SECRETS},
    )


def _http_config(args: argparse.Namespace) -> HttpConfig:
    api_key, admin_api_key = (
        os.environ.get(f"JAXSERVE_{name.upper()}") or None if getattr(args, name) is None else getattr(args, name)
        for name in _SECRETS
    )
    return HttpConfig(
        host=args.host,
        port=args.port,
        served_model_name=args.served_model_name,
        api_key=api_key,
        admin_api_key=admin_api_key,
        max_queued_requests=args.max_queued_requests,
        strict_params=args.strict_params,
        log_requests=args.log_requests,
        enable_metrics=args.enable_metrics,
        skip_warmup=args.skip_server_warmup,
        drain_timeout_s=args.drain_timeout,
    )


def _output_config(args: argparse.Namespace) -> OutputConfig:
    return OutputConfig(
        sampling_defaults=args.sampling_defaults,
        preferred_sampling_params=args.preferred_sampling_params,
        random_seed=args.random_seed,
        reasoning_parser=args.reasoning_parser,
        tool_call_parser=args.tool_call_parser,
        completion_template=args.completion_template,
        grammars=args.grammar_backend != "none",
        json_whitespace=not args.constrained_json_disable_any_whitespace,
        json_whitespace_pattern=args.constrained_json_whitespace_pattern,
    )


def _devices(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parallelism sizes. As in SGLang, `--tp-size` counts all devices with `--enable-dp-attention`."""
    tp_size, dp_size, ep_size = args.tp_size, args.dp_size, args.ep_size
    if not args.enable_dp_attention or dp_size < 1:
        return {"tp_size": tp_size, "dp_size": dp_size, "ep_size": ep_size}
    ep_size = tp_size if ep_size in (None, 1) else ep_size  # by default each device holds different experts
    for flag, size in (("--tp-size", tp_size), ("--ep-size", ep_size)):
        if size % dp_size:
            raise LaunchError(f"--enable-dp-attention: --dp-size {dp_size} does not divide {flag} {size}")
    return {"tp_size": tp_size // dp_size, "dp_size": dp_size, "ep_size": ep_size // dp_size, "dp_attention": True}


def step_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `EngineConfig` that `model_flags`, `memory_flags` and `device_flags` set."""
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
        "activation_quantization": args.activation_quantization,
        "attention_backend": args.attention_backend,
        "deterministic": args.enable_deterministic_inference,
    }


def lora_slots(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `LoraConfig` that `lora_slot_flags` set."""
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
    """Return the LoRA settings, with adapter paths as the user gave them; the launcher resolves their folders."""
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
    """Create and return the folder; it is private because its contents are executed.

    All models share it: JAX's keys cover the program, the compiler's flags and the versions.
    """
    if args.compilation_cache_dir == "none":
        return None
    folder = Path(args.compilation_cache_dir) if args.compilation_cache_dir else cache_folder() / "compiled"
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
