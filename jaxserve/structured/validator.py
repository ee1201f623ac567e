"""Compiles grammars in a separate process to validate them, and kills the process if a grammar takes too long.

Grammars come from clients, and their compiler cannot be interrupted. The engine compiles only validated grammars.

`python -m jaxserve.structured.validator` is that process: it reads the tokenizer and then grammars, each as a line of
JSON, and answers each grammar with a line of JSON: an error message, or null.
"""

import asyncio
import hashlib
import selectors
import signal
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import msgspec

from jaxserve.errors import OverloadedError, RequestError
from jaxserve.request import GrammarTokenizer
from jaxserve.structured.compiler import GrammarError, compile_grammar, load_tokenizer

_TIME_LIMIT_S = 1.5
_MAX_WORKERS = 2
# A client that sends many bad grammars must not delay the requests of other clients for long.
_MAX_WAIT_S = 5.0
_MAX_VERDICTS = 1024


_TOO_LONG = f"it is too complex: not compiled within {_TIME_LIMIT_S} s"


class GrammarValidator:
    """Checks whether grammars can be used.

    Args:
        tokenizer: tokenizer of the served model.
    """

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        self._tokenizer = msgspec.json.encode(tokenizer) + b"\n"
        self._threads = ThreadPoolExecutor(_MAX_WORKERS, thread_name_prefix="grammar")
        self._idle: list[subprocess.Popen[bytes]] = []
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        self._closed = False

    async def start(self) -> None:
        """Start a process in advance, so that the first grammar does not wait for it."""
        await asyncio.get_running_loop().run_in_executor(self._threads, lambda: self._keep(self._spawn()))

    async def check(self, grammar: str, param: str | None) -> None:
        """Reject a grammar that cannot be compiled, accepts nothing, or takes too long.

        Raises:
            RequestError: the grammar is rejected; the message states the reason.
            OverloadedError: too many grammars are waiting to be checked.
        """
        key = hashlib.sha256(grammar.encode()).digest()
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            error = self._verdicts[key]
        else:
            error = await self._try_in_thread(grammar)
            if error != _TOO_LONG:  # it may compile in time when the machine is less busy
                self._verdicts[key] = error
            if len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        if error is not None:
            raise RequestError(f"{param or 'grammar'}: {error}", param=param)

    def close(self) -> None:
        """Kill the processes."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        while self._idle:
            _end(self._idle.pop())

    async def _try_in_thread(self, grammar: str) -> str | None:
        try:
            async with asyncio.timeout(_MAX_WAIT_S):
                return await asyncio.get_running_loop().run_in_executor(self._threads, self._try, grammar)
        except TimeoutError:
            raise OverloadedError("too many grammars are waiting to be validated; try again in a second") from None

    def _try(self, grammar: str) -> str | None:
        process = self._idle.pop() if self._idle else self._spawn()
        line: bytes | None = b""
        try:
            line = _ask(process, grammar)
        except OSError:  # the process has ended
            pass
        finally:
            if line:
                self._keep(process)
            else:
                _end(process)
        if line is None:
            return _TOO_LONG
        return msgspec.json.decode(line, type=str | None) if line else "it is too complex: the compiler failed"

    def _keep(self, process: subprocess.Popen[bytes]) -> None:
        if self._closed:
            _end(process)
        else:
            self._idle.append(process)

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", __name__]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(self._tokenizer)
        process.stdin.flush()
        process.stdout.readline()  # the process is ready
        return process


def _ask(process: subprocess.Popen[bytes], grammar: str) -> bytes | None:
    """Return the process's answer; None if it takes too long, empty if the process ends."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(grammar) + b"\n")
    process.stdin.flush()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(_TIME_LIMIT_S) else None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _main() -> None:
    tokenizer = load_tokenizer(msgspec.json.decode(sys.stdin.buffer.readline(), type=GrammarTokenizer))
    answer = b"null"
    while True:
        signal.alarm(0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        # Ends this process if the parent is gone and cannot kill it after the time limit.
        signal.alarm(int(_TIME_LIMIT_S) + 5)
        try:
            compile_grammar(tokenizer, msgspec.json.decode(line, type=str))
            answer = b"null"
        except GrammarError as error:
            answer = msgspec.json.encode(str(error))


if __name__ == "__main__":
    _main()
