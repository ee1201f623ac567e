"""Fixtures and helpers that run the real server, in its own process or in this one."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from api.app import create_app
from api.server import Server
from jaxserve.config import EngineConfig
from jaxserve.engine.builder import build_engine
from jaxserve.engine.in_process_client import InProcessEngineClient
from jaxserve.text.tokenizer import Tokenizer
from tests.support.ports import free_port
from tests.support.tiny import write_checkpoint

START_S = 300


@contextlib.asynccontextmanager
async def loaded(folder: Path, **options: Any) -> AsyncIterator[InProcessEngineClient]:
    """Run an engine in this process, so that one load serves servers with different settings."""
    config = EngineConfig(model_path=str(folder), dtype="float32", page_size=16, show_progress=False, **options)
    built = await asyncio.to_thread(build_engine, config, lambda items, *_: items)
    client = InProcessEngineClient(built.engine, built.info)
    yield client
    client.stop()


@contextlib.asynccontextmanager
async def serving(server: Server, tokenizer: Tokenizer) -> AsyncIterator[str]:
    """Run a server in this process on its own socket, and yield its address."""
    server.serve(tokenizer)
    http = uvicorn.Server(uvicorn.Config(create_app(server), port=0, log_level="warning", lifespan="off"))
    http.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(http.serve())
    while not http.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}"
    finally:
        http.should_exit = True
        await task
        server.close()


class ServerProcess:
    """`python -m jaxserve.launch` on a free port."""

    def __init__(self, *arguments: str, log: Path, devices: int = 1) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jaxserve.launch", "--port", str(self.port), *arguments],
                stdout=file,
                stderr=file,
                env=environment,
            )

    def wait_ready(self) -> "ServerProcess":
        """Wait until `/health` answers with status 200."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after {START_S} s:\n{self.log.read_text()}")

    def engine_pid(self) -> int:
        """Return the process id of the engine."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def stop(self) -> int:
        """Send SIGTERM, wait for the process to end, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def flags(checkpoint: Path, compilation_cache: str) -> list[str]:
    """Flags that keep the tiny server small and its start short."""
    return [
        "--model-path", str(checkpoint), "--served-model-name", "tiny", "--max-running-requests", "8",
        "--chunked-prefill-size", "32", "--max-total-tokens", "8192", "--page-size", "16",
        "--compilation-cache-dir", compilation_cache,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def server(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess(*flags, "--max-queued-requests", "64", log=tmp_path_factory.mktemp("logs") / "server.log")
    try:
        yield process.wait_ready()
    finally:
        assert process.stop() == 0, process.log.read_text()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = ServerProcess(
        "--model-path", "demo", "--max-running-requests", "8", log=tmp_path_factory.mktemp("demo") / "log"
    )
    try:
        yield server.wait_ready()
    finally:
        assert server.stop() == 0
