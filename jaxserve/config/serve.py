"""Settings of the launcher: what it does with flags that are not the engine's."""

from collections.abc import Mapping
from typing import Any, Literal

from jaxserve.config.base import Config
from jaxserve.config.engine import EngineConfig
from jaxserve.errors import LaunchError

LogLevel = Literal["debug", "info", "warning", "error"]


class ModelFiles(Config, frozen=True):
    """Where the files of the model come from, as the user named them.

    Attributes:
        model_path: a folder, a `.gguf` file, a Hugging Face id, or `demo`.
        revision: revision of the Hugging Face repository.
        download_dir: folder for downloads; the Hugging Face cache if None.
        tokenizer_path: folder or `.gguf` file of the tokenizer; the model's own if None.
        chat_template: a Jinja file, a template as text, or a built-in name; the model's own if None.
        merge_lora: an adapter to add to the weights: `path` or `name=path`.
    """

    model_path: str
    revision: str | None
    download_dir: str | None
    tokenizer_path: str | None
    chat_template: str | None
    merge_lora: str | None


class HttpConfig(Config, frozen=True):
    """The HTTP server.

    Attributes:
        host, port: address to bind.
        served_model_name: name of the model in the API; its path if None.
        api_key, admin_api_key: keys that clients must send, if any.
        max_queued_requests: choices that may wait; no limit if None.
        strict_params: refuse fields that are not known.
        log_requests: log one line per request.
        enable_metrics: serve `/metrics`.
        skip_warmup: report ready before a token was generated.
        drain_timeout_s: seconds that running requests get after SIGTERM.
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
    """How requests are sampled and their outputs read.

    Attributes:
        sampling_defaults: `model` for the model's own sampling parameters, `openai` for OpenAI's.
        preferred_sampling_params: the user's own defaults, which win over `sampling_defaults`.
        random_seed: makes the seeds of requests without a seed reproducible.
        reasoning_parser: name of a reasoning format, `auto`, or None for none.
        tool_call_parser: name of a tool-call format, or `auto`.
        completion_template: name or text of the template of requests with a suffix; None refuses them.
        grammars: serve structured outputs.
        json_whitespace: allow white space in constrained JSON.
        json_whitespace_pattern: a regular expression of that white space; the grammar's own if None.
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
    """Everything on the command line.

    Attributes:
        engine: settings of the engine process; `model_path` is still the user's name for the model.
        files: where the files of the model come from.
        http: the HTTP server.
        output: sampling defaults, parsers and grammars.
        lora_root: folder whose adapters may be loaded while serving.
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
