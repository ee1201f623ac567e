"""`python -m jaxserve.launch`: flags -> configs -> engine process -> application -> uvicorn.

This is the composition root; only `jaxserve.cli` imports it. While the engine loads, the API answers `/live` and
responds to `/health` with 503.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

# Set before transformers is imported: only its tokenizers are used, so it need not warn that torch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import msgspec
import uvicorn
import uvloop

from api.app import create_app
from api.http_protocol import BoundedHttpProtocol
from api.server import ApiSettings, Server
from jaxserve.arguments import parse_arguments
from jaxserve.config import EngineConfig, ModelFiles, OutputConfig, ServeConfig
from jaxserve.engine.output_processor import GenerationStream, TextOptions
from jaxserve.engine.process_client import ProcessEngineClient
from jaxserve.errors import ExitCode, LaunchError
from jaxserve.loading.generation_config import find_generation_config
from jaxserve.loading.hub import find_adapter, find_model
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured.grammar import JsonStyle
from jaxserve.text.chat_template import BUILT_IN_TEMPLATES
from jaxserve.text.completion_template import COMPLETION_TEMPLATES, CompletionTemplate
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("jaxserve")


def main() -> int:
    """Run the server; return the exit code."""
    try:
        config = parse_arguments(sys.argv[1:])
        logging.basicConfig(
            level=config.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        for noisy in ("httpx", "huggingface_hub", "filelock"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        if config.engine.node_rank > 0:
            return _follow(config)
        with _bind(config.http.host, config.http.port) as listener:
            template = _chat_template(config.files.chat_template)
            path = _find_model(config.files)
            launcher = _Launcher(config, path, template)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return int(runner.run(launcher.run(listener)))
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)


def _follow(config: ServeConfig) -> int:
    """Run the engine process of a host other than 0, without the API, until host 0 ends."""
    engine = msgspec.structs.replace(config.engine, model_path=str(_find_model(config.files)))
    engine = _with_adapters(engine, _find_merged(config.files), config.files)
    with subprocess.Popen([sys.executable, "-m", "jaxserve.engine.process"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        signals: list[int] = []

        def on_signal(number: int, _: object) -> None:
            # Host 0 drains first and then tells this host to exit; after a second signal, do not wait for that.
            signals.append(number)
            if len(signals) > 1:
                process.kill()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        process.stdin.write(msgspec.json.encode(engine) + b"\n")
        process.stdin.flush()
        # Standard input stays open until the process ends: its end tells the process that this one has died.
        code = process.wait()
    return code if code >= 0 else int(ExitCode.ENGINE_LOST)


def _find_model(files: ModelFiles) -> Path:
    return find_model(files.model_path, files.revision, files.download_dir)


class _NamedAdapter(NamedTuple):
    """The name and the folder of an adapter."""

    name: str
    path: Path


def _find_merged(files: ModelFiles) -> _NamedAdapter | None:
    """Return the adapter of `--merge-lora`, given as `path` or `name=path`."""
    if files.merge_lora is None:
        return None
    name, separator, path = files.merge_lora.partition("=")
    folder = find_adapter(path if separator else name, files.download_dir)
    return _NamedAdapter(name if separator else Path(name).name, folder)


def _with_adapters(engine: EngineConfig, merged: _NamedAdapter | None, files: ModelFiles) -> EngineConfig:
    """Return the config with the folders of all adapters filled in."""
    if merged is not None:
        engine = msgspec.structs.replace(engine, merge_lora=str(merged.path))
    if engine.lora is None:
        return engine
    paths = {name: str(find_adapter(path, files.download_dir)) for name, path in engine.lora.paths.items()}
    return msgspec.structs.replace(engine, lora=msgspec.structs.replace(engine.lora, paths=paths))


def _bind(host: str, port: int) -> socket.socket:
    """Bind the port now, so that a busy port is reported before weights are read."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        busy = error.errno == errno.EADDRINUSE
        code = ExitCode.PORT_IN_USE if busy else ExitCode.BAD_CONFIG
        raise LaunchError(f"cannot listen on {host}:{port}: {error.strerror}", exit_code=code) from None
    return listener


def _chat_template(value: str | None) -> str | None:
    if value is None:
        return None
    if value in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[value]
    if "{" in value:
        return value
    try:
        return Path(value).read_text()
    except OSError as error:
        names = ", ".join(BUILT_IN_TEMPLATES)
        raise LaunchError(f"--chat-template {value}: neither a readable file nor one of {names}: {error}") from None


def _completion_template(value: str | None) -> CompletionTemplate | None:
    return None if value is None else CompletionTemplate(COMPLETION_TEMPLATES.get(value, value))


def _json_style(output: OutputConfig) -> JsonStyle | None:
    if not output.grammars:
        return None
    if not output.json_whitespace:
        return JsonStyle(whitespace=None)
    pattern = output.json_whitespace_pattern
    return JsonStyle() if pattern is None else JsonStyle(whitespace=pattern)


def _api_settings(config: ServeConfig, path: Path, merged: _NamedAdapter | None) -> ApiSettings:
    files, http, output = config.files, config.http, config.output
    return ApiSettings(
        model_path=files.model_path,
        served_model_name=http.served_model_name or (merged.name if merged is not None else files.model_path),
        api_key=http.api_key,
        admin_api_key=http.admin_api_key,
        generation=find_generation_config(
            files.model_path, path, defaults=output.sampling_defaults, preferred=output.preferred_sampling_params
        ),
        reasoning_parser=output.reasoning_parser,
        tool_call_parser=output.tool_call_parser,
        json_style=_json_style(output),
        completion_template=_completion_template(output.completion_template),
        lora=config.engine.lora,
        lora_root=config.lora_root,
        strict_params=http.strict_params,
        server_args=config.flags,
        log_requests=http.log_requests,
        enable_metrics=http.enable_metrics,
        random_seed=output.random_seed,
    )


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the launcher drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


class _Launcher:
    """One run of the server, from loading to exit."""

    def __init__(self, config: ServeConfig, path: Path, template: str | None) -> None:
        self._config = config
        self._path = path
        self._template = template
        merged = _find_merged(config.files)
        engine = msgspec.structs.replace(config.engine, model_path=str(path))
        engine = _with_adapters(engine, merged, config.files)
        self._client = ProcessEngineClient(engine, config.http.max_queued_requests)
        self._server = Server(_api_settings(config, path, merged), self._client)
        self._http = _HttpServer(
            uvicorn.Config(
                create_app(self._server),
                http=BoundedHttpProtocol,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )
        self._signals = 0
        self._stop = asyncio.Event()

    async def run(self, listener: socket.socket) -> ExitCode:
        """Load, serve, drain."""
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        serving = asyncio.create_task(self._http.serve(sockets=[listener]))
        loading = asyncio.create_task(self._load())
        stopping = asyncio.create_task(self._stop.wait())
        lost = asyncio.create_task(self._client.exited.wait())
        try:
            await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                url = _url(listener)
                logger.info(
                    "ready after %.1f s: %s/v1 serves %s",
                    time.perf_counter() - started,
                    url,
                    self._config.files.model_path,
                )
                await asyncio.wait((stopping, lost, serving), return_when=asyncio.FIRST_COMPLETED)
            if lost.done() and not stopping.done():
                logger.error("the engine process exited with code %s; shutting down", self._client.exit_code)
                await asyncio.sleep(0.5)  # open requests get their error first
                return ExitCode.ENGINE_LOST
            await self._drain()
            return ExitCode.OK
        finally:
            loading.cancel()
            lost.cancel()
            self._http.should_exit = True
            await serving
            self._server.close()
            await self._client.stop()

    async def _load(self) -> None:
        loop = asyncio.get_running_loop()
        # Run both concurrently, so that whichever fails first is reported first.
        _, loaded = await asyncio.gather(self._client.start(), loop.run_in_executor(None, self._load_tokenizer))
        if not self._config.http.skip_warmup:
            await self._warm_up(loaded)
        self._server.serve(loaded)  # from here on /health is 200
        await self._server.prepare_grammars()

    def _load_tokenizer(self) -> Tokenizer:
        start = time.perf_counter()
        own = self._config.files.tokenizer_path
        path = Path(own) if own else self._path
        tokenizer = load_tokenizer(path, self._template)
        logger.info("tokenizer: %.1f s, %d tokens", time.perf_counter() - start, tokenizer.vocab_size)
        return tokenizer

    async def _warm_up(self, tokenizer: Tokenizer) -> None:
        """Generate two tokens; raise LaunchError if the model cannot."""
        request = Request(id="warm-up", prompt_token_ids=(0,), sampling=SamplingParams(temperature=0, max_tokens=2))
        generation = GenerationStream(self._client, tokenizer, request, TextOptions())
        try:
            async for delta in generation.deltas():
                if delta.error is not None:
                    raise LaunchError(f"the model cannot generate: {delta.error}")
        finally:
            generation.close()

    def _on_signal(self) -> None:
        self._signals += 1
        self._server.draining = True
        self._stop.set()
        if self._signals > 1:
            logger.warning("second signal: exiting now")
            self._client.kill()

    async def _drain(self) -> None:
        """Let running requests finish; end those left at the time limit with an error."""
        logger.info(
            "draining: no new requests, up to %.0f s for %d running",
            self._config.http.drain_timeout_s,
            len(self._server.running),
        )
        deadline = time.monotonic() + self._config.http.drain_timeout_s
        while self._server.running and time.monotonic() < deadline and not self._client.exited.is_set():
            await asyncio.sleep(0.05)
        for generation in [one for several in self._server.running.values() for one in several]:
            generation.interrupt("the server is shutting down")
        limit = time.monotonic() + 1
        while self._server.running and time.monotonic() < limit:
            await asyncio.sleep(0.01)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    sys.exit(main())
