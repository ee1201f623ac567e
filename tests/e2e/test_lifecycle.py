"""The lifecycle of a server process: start, refusal to start, drain, and loss of the engine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.conftest import ServerProcess


def stream_lines(url: str, body: dict[str, Any], out: list[str], started: threading.Event) -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line:
                out.append(line.removeprefix("data: "))
                started.set()


def start_stream(server: ServerProcess, max_tokens: int) -> tuple[threading.Thread, list[str]]:
    """Start a stream in a thread, and return once its first event has arrived."""
    out: list[str] = []
    started = threading.Event()
    body = {"prompt": "abc", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    thread = threading.Thread(target=stream_lines, args=(server.url, body, out, started))
    thread.start()
    assert started.wait(30)
    return thread, out


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_sigterm_lets_running_requests_finish(flags: list[str], tmp_path: Path) -> None:
    server = ServerProcess(*flags, log=tmp_path / "log").wait_ready()
    [engine] = children(server.process.pid)
    thread, lines = start_stream(server, 300)
    os.kill(server.engine_pid(), signal.SIGSTOP)  # so that the stream does not end before the other request
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
    os.kill(server.engine_pid(), signal.SIGCONT)
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    thread.join(60)
    assert lines[-1] == "[DONE]"
    assert json.loads(lines[-2])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(20) == 0
    assert not Path(f"/proc/{engine}").exists()


def test_the_drain_has_a_limit(flags: list[str], tmp_path: Path) -> None:
    server = ServerProcess(*flags, "--drain-timeout", "0.2", log=tmp_path / "log").wait_ready()
    os.kill(server.engine_pid(), signal.SIGSTOP)  # so that the request would take for ever
    thread = threading.Thread(target=lambda: httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}))
    out: list[str] = []
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}

    def chat() -> None:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
            out.extend(line for line in response.iter_lines() if line)

    thread = threading.Thread(target=chat)
    thread.start()
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    thread.join(10)
    assert "shutting down" in json.loads(out[-1].removeprefix("data: "))["error"]["message"]
    server.process.send_signal(signal.SIGTERM)  # after a second signal, the stopped engine is not waited for
    assert server.process.wait(15) == 0


def test_the_engine_is_lost(flags: list[str], tmp_path: Path) -> None:
    server = ServerProcess(*flags, log=tmp_path / "log").wait_ready()
    thread, lines = start_stream(server, 400)
    os.kill(server.engine_pid(), signal.SIGKILL)
    killed = time.monotonic()
    thread.join(10)
    assert time.monotonic() - killed < 2
    assert json.loads(lines[-1])["error"]["type"] == "service_unavailable_error"
    assert server.process.wait(10) == 70


def test_the_engine_goes_with_its_parent(flags: list[str], tmp_path: Path) -> None:
    server = ServerProcess(*flags, log=tmp_path / "log").wait_ready()
    engine = server.engine_pid()
    server.process.kill()
    server.process.wait(10)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{engine}/cmdline").exists() and Path(f"/proc/{engine}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the engine outlives its parent"
        time.sleep(0.05)


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxserve.launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_busy_port_is_reported_before_the_model_is_read(server: ServerProcess) -> None:
    result = launch("--model-path", "/does/not/exist", "--port", str(server.port))
    assert result.returncode == 3
    assert "Address already in use" in result.stderr


def test_an_engine_that_cannot_start_says_why(checkpoint: Path) -> None:
    """The engine process finds the problem; the launcher prints the message and ends with the exit code."""
    result = launch("--model-path", str(checkpoint), "--port", "0", "--tp", "3")
    assert result.returncode == 2
    assert "error: --tp-size 3 does not divide the model's 8 attention heads" in result.stderr, result.stderr
    assert "weights:" not in result.stderr


def test_eight_devices_give_the_tokens_of_one(flags: list[str], server: ServerProcess, tmp_path: Path) -> None:
    body = {
        "prompt": ["sharded or not", "the tokens are the same"],
        "max_tokens": 48,
        "temperature": 0.8,
        "seed": 3,
        "n": 2,
    }
    split = ServerProcess(*flags, "--tp", "8", log=tmp_path / "log", devices=8).wait_ready()
    try:
        answers = [httpx.post(f"{s.url}/v1/completions", json=body, timeout=60).json() for s in (server, split)]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert httpx.get(f"{split.url}/get_server_info").json()["device"].startswith("8 x cpu")
    finally:
        assert split.stop() == 0
