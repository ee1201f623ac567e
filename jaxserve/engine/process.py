"""The engine process: builds the engine, then handles messages, runs steps, and sends their results.

`ProcessEngineClient` starts it as `python -m jaxserve.engine.process ENDPOINT` and writes the `EngineConfig` as one
line of JSON to its standard input, which stays open. If it closes, the parent has died, and this process exits.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable
from typing import Any

import msgspec
import zmq

from jaxserve.config import EngineConfig
from jaxserve.engine.messages import (
    Deltas,
    EngineStats,
    FromEngine,
    Ready,
    StartFailed,
    decode_to_engine,
    encode,
)
from jaxserve.errors import ExitCode, LaunchError
from jaxserve.layout.memory import GPU_MEM_FRACTION

logger = logging.getLogger("jaxserve.engine.engine")

_IDLE_POLL_MS = 1000


def main() -> int:
    """Run until the API process sends `Shutdown`; return the exit code."""
    # Ctrl-C signals the whole process group, and a service manager every process. Ignore the signals: the parent
    # drains first and then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = msgspec.json.decode(_read_line(), type=EngineConfig)
    # By default JAX leaves a quarter of a GPU's memory to other processes; there are none.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEM_FRACTION))
    threading.Thread(target=_exit_with_parent, name="parent-watch", daemon=True).start()
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("jax").setLevel(logging.WARNING)  # it logs every unavailable platform
    if config.node_rank > 0:
        return _follow(config)
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(sys.argv[1])
    code = _serve(socket, config)
    socket.close(linger=2000)
    context.term()
    return code if code == ExitCode.OK else _leave(config, code)


def _serve(socket: "zmq.Socket[bytes]", config: EngineConfig) -> ExitCode:
    try:
        _Worker(socket, config).run()
    except LaunchError as error:
        socket.send(encode(StartFailed(error=str(error))))
        return error.exit_code
    except Exception:
        logger.exception("the engine failed")
        return ExitCode.ENGINE_LOST
    return ExitCode.OK


def _follow(config: EngineConfig) -> int:
    """Run the engine on a host other than 0, without the API."""
    from jaxserve.engine.builder import build_follower

    try:
        follower = build_follower(config, lambda items, name, total: _bar(items, name, total, config.show_progress))
        logger.info("host %d is ready", config.node_rank)
        follower.run()
    except LaunchError as error:
        logger.error("%s", error)
        return _leave(config, error.exit_code)
    except Exception:
        logger.exception("host %d failed", config.node_rank)
        return _leave(config, ExitCode.ENGINE_LOST)
    return int(ExitCode.OK)


def _leave(config: EngineConfig, code: ExitCode) -> int:
    """Return the exit code; with several hosts, exit immediately, since JAX would wait for the other hosts to end."""
    if config.nnodes > 1:
        logging.shutdown()
        os._exit(int(code))
    return int(code)


class _Worker:
    """The engine and its socket."""

    def __init__(self, socket: "zmq.Socket[bytes]", config: EngineConfig) -> None:
        # Imported here, because jax uses the signal handlers and the environment as they are at its import.
        from jaxserve.engine.builder import build_engine

        self._socket = socket
        self._built = build_engine(config, lambda items, name, total: _bar(items, name, total, config.show_progress))
        self._engine = self._built.engine
        self._send(Ready(info=self._built.info))

    def run(self) -> None:
        """Run steps while there is work; wait for messages while there is none."""
        while True:
            while self._socket.poll(0 if not self._engine.idle else _IDLE_POLL_MS):
                if not self._engine.handle(decode_to_engine(self._socket.recv()), self._send):
                    if self._built.followers is not None:
                        self._built.followers.finish()
                    return
            if not self._engine.idle:
                deltas = self._engine.step()
                if deltas:
                    self._send(Deltas(deltas=deltas, stats=self._stats()))

    def _stats(self) -> EngineStats:
        return EngineStats(**self._engine.stats._asdict(), **self._built.compiles.counts())

    def _send(self, message: FromEngine) -> None:
        self._socket.send(encode(message))


def _read_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 4096)
        if not part:
            sys.exit(int(ExitCode.ENGINE_LOST))
        line += part
    return line


def _exit_with_parent() -> None:
    # Read the raw descriptor: a buffered read would hold a lock that interpreter shutdown needs.
    while os.read(0, 4096):
        pass
    os._exit(int(ExitCode.ENGINE_LOST))


def _bar(items: Iterable[Any], name: str, total: int, show: bool) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, desc=name, total=total, disable=None if show else True, leave=False)


if __name__ == "__main__":
    sys.exit(main())
