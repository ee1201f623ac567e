"""Settings of the launcher: the flags that are not settings of the engine."""

from collections.abc import Mapping
from typing import Any, Literal

from jaxserve.config.base import Config
from jaxserve.config.engine import EngineConfig
from jaxserve.errors import LaunchError

LogLevel = Literal["debug", "info", "warning", "error"]


class ModelFiles(Config, frozen=True):
    """Sources of the model's files, as named by the user.

    Attributes:
        model_path: a folder, a `.gguf` file, a Hugging Face id, or `demo`.
        revision: revision of the Hugging Face repository.
        download_dir: folder for downloads; None for the Hugging Face cache.
        tokenizer_path: folder or `.gguf` file of the tokenizer; None for the model's.
        chat_template: a Jinja file, a template as text, or a built-in name; None for the model's.
        merge_lora: a LoRA adapter to merge into the weights: `path` or `name=path`.
    """

    model_path: str
    revision: str | None
    download_dir: str | None
    tokenizer_path: str | None
    chat_template: str | None
    merge_lora: str | None


class HttpConfig(Config, frozen=True):
    """Settings of the HTTP server.

    Attributes:
        host, port: address to bind.
        served_model_name: name of the model in the API; None for its path.
        api_key, admin_api_key: keys that clients must send, if any.
        max_queued_requests: maximum number of waiting choices; None for no limit.
        strict_params: reject requests with unknown fields.
        log_requests: log one line per request.
        enable_metrics: serve `/metrics`.
        skip_warmup: report ready without generating a token first.
        drain_timeout_s: seconds that running requests have to finish after SIGTERM.
    """

    host: str
    port: int
    served_model_name: str | None
    api_key: str | None
    admin_api_key: str | None
    max_queued_requests: int | None
    strict_params: bool
    log_requests: bool
    enable_metrics: bool
    skip_warmup: bool
    drain_timeout_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise LaunchError(f"--port must be between 0 and 65535, got {self.port}")
        if self.drain_timeout_s < 0:
            raise LaunchError(f"--drain-timeout must not be negative, got {self.drain_timeout_s}")
        for flag, key in (("--api-key", self.api_key), ("--admin-api-key", self.admin_api_key)):
            if key == "":
                raise LaunchError(f"{flag} must not be empty")


class OutputConfig(Config, frozen=True):
    """Sampling defaults, output parsers and structured outputs.

    Attributes:
        sampling_defaults: `model` for the model's own sampling parameters, `openai` for OpenAI's.
        preferred_sampling_params: defaults given by the user, which override `sampling_defaults`.
        random_seed: makes the seeds chosen for requests without one reproducible.
        reasoning_parser: name of a reasoning format, or `auto`; None for none.
        tool_call_parser: name of a tool-call format, or `auto`.
        completion_template: name or text of the template for requests with a suffix; None rejects such requests.
        grammars: enable structured outputs.
        json_whitespace: allow white space in constrained JSON.
        json_whitespace_pattern: a regular expression for that white space; None for the grammar's default.
    """

    sampling_defaults: Literal["model", "openai"]
    preferred_sampling_params: Mapping[str, Any] | None
    random_seed: int | None
    reasoning_parser: str | None
    tool_call_parser: str
    completion_template: str | None
    grammars: bool
    json_whitespace: bool
    json_whitespace_pattern: str | None


class ServeConfig(Config, frozen=True):
    """All command-line settings.

    Attributes:
        engine: settings of the engine process; `model_path` is still the user's name for the model.
        files: sources of the model's files.
        http: settings of the HTTP server.
        output: sampling defaults, parsers and grammars.
        lora_root: folder from which adapters may be loaded while serving.
        log_level: log level of all processes.
        flags: every flag by name, without secrets, for `/get_server_info`.
    """

    engine: EngineConfig
    files: ModelFiles
    http: HttpConfig
    output: OutputConfig
    lora_root: str | None
    log_level: LogLevel
    flags: Mapping[str, Any]
