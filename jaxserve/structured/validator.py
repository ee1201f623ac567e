"""Tries grammars in a process of its own, which is ended when one takes too long.

A grammar comes from a client, and its compiler cannot be interrupted. The engine compiles only what passed here.

Run as `python -m jaxserve.structured.validator` the module is that process: it reads the tokenizer and then grammars,
each a line of JSON, and answers each grammar with a line: what is wrong with it, or null.
"""

import asyncio
import select
import signal
import subprocess
import sys
import threading
from collections import OrderedDict

import msgspec

from jaxserve.errors import RequestError
from jaxserve.request import GrammarTokenizer
from jaxserve.structured.compiler import GrammarError, compile_grammar, load_tokenizer

_TIME_LIMIT_S = 1.5
_MAX_WORKERS = 2
_MAX_VERDICTS = 1024


class GrammarValidator:
    """Says whether grammars can be used.

    Args:
        tokenizer: of the served model.
    """

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        self._tokenizer = msgspec.json.encode(tokenizer) + b"\n"
        self._free = threading.BoundedSemaphore(_MAX_WORKERS)
        self._idle: list[subprocess.Popen[bytes]] = []
        self._verdicts: OrderedDict[str, str | None] = OrderedDict()
        self._closed = False

    async def start(self) -> None:
        """Have a process ready, so that the first grammar does not wait for it."""
        await asyncio.to_thread(self._warm_up)

    async def check(self, grammar: str, param: str | None) -> None:
        """Refuse a grammar that cannot be compiled, accepts nothing, or takes too long.

        Raises:
            RequestError: what is wrong with it.
        """
        if grammar not in self._verdicts:
            self._verdicts[grammar] = await asyncio.to_thread(self._try, grammar)
            if len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        error = self._verdicts[grammar]
        self._verdicts.move_to_end(grammar)
        if error is not None:
            raise RequestError(f"{param or 'grammar'}: {error}", param=param)

    def close(self) -> None:
        """End the processes."""
        self._closed = True
        while self._idle:
            _end(self._idle.pop())

    def _warm_up(self) -> None:
        with self._free:
            self._keep(self._spawn())

    def _try(self, grammar: str) -> str | None:
        with self._free:
            process = self._idle.pop() if self._idle else self._spawn()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(msgspec.json.encode(grammar) + b"\n")
                process.stdin.flush()
                if not select.select([process.stdout], [], [], _TIME_LIMIT_S)[0]:
                    _end(process)
                    return f"it is too complex: not compiled within {_TIME_LIMIT_S} s"
                line = process.stdout.readline()
            except OSError:
                line = b""
            if not line:
                _end(process)
                return "it is too complex: the compiler failed"
            self._keep(process)
            return msgspec.json.decode(line, type=str | None)

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
        process.stdout.readline()  # it is ready
        return process


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
        # Should the parent be gone by then, the kernel ends this process.
        signal.alarm(int(_TIME_LIMIT_S) + 5)
        try:
            compile_grammar(tokenizer, msgspec.json.decode(line, type=str))
            answer = b"null"
        except GrammarError as error:
            answer = msgspec.json.encode(str(error))


if __name__ == "__main__":
    _main()
