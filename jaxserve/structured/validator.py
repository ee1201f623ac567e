"""Tries grammars in a process of its own, which is ended when one takes too long.

A grammar comes from a client, and its compiler cannot be interrupted. The engine compiles only what passed here.

Run as `python -m jaxserve.structured.validator` the module is that process: it reads the tokenizer and then grammars,
each a line of JSON, and answers each grammar with a line: what is wrong with it, or null.
"""

import asyncio
import contextlib
import sys
from collections import OrderedDict
from collections.abc import AsyncGenerator

import msgspec

from jaxserve.errors import RequestError
from jaxserve.request import GrammarTokenizer
from jaxserve.structured.compiler import GrammarError, compile_grammar, load_tokenizer

_TIME_LIMIT_S = 1.5
_MAX_WORKERS = 2
_MAX_VERDICTS = 1024
_MAX_LINE_BYTES = 1 << 24


class GrammarValidator:
    """Says whether grammars can be used.

    Args:
        tokenizer: of the served model.
    """

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        self._tokenizer = msgspec.json.encode(tokenizer) + b"\n"
        self._idle: list[asyncio.subprocess.Process] = []
        self._free = asyncio.Semaphore(_MAX_WORKERS)
        self._verdicts: OrderedDict[str, str | None] = OrderedDict()

    async def start(self) -> None:
        """Have a process ready, so that the first grammar does not wait for it."""
        async with self._worker():
            pass

    async def check(self, grammar: str, param: str | None) -> None:
        """Refuse a grammar that cannot be compiled, accepts nothing, or takes too long.

        Raises:
            RequestError: what is wrong with it.
        """
        if grammar not in self._verdicts:
            self._verdicts[grammar] = await self._try(grammar)
            if len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(grammar)
        if (error := self._verdicts[grammar]) is not None:
            raise RequestError(f"{param or 'grammar'}: {error}", param=param)

    def close(self) -> None:
        """End the processes."""
        for process in self._idle:
            process.kill()
        self._idle.clear()

    async def _try(self, grammar: str) -> str | None:
        async with self._worker() as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(msgspec.json.encode(grammar) + b"\n")
            try:
                async with asyncio.timeout(_TIME_LIMIT_S):
                    line = await process.stdout.readline()
            except TimeoutError:
                process.kill()
                await process.wait()
                return f"it is too complex: not compiled within {_TIME_LIMIT_S} s"
            if not line:
                await process.wait()
                return "it is too complex: the compiler failed"
            return msgspec.json.decode(line, type=str | None)

    @contextlib.asynccontextmanager
    async def _worker(self) -> AsyncGenerator[asyncio.subprocess.Process]:
        """A process that waits for a grammar; it is kept unless it ended or is still at work."""
        async with self._free:
            process = self._idle.pop() if self._idle else await self._spawn()
            try:
                yield process
            except BaseException:
                process.kill()  # an answer nobody waited for must not meet the next grammar
                raise
            if process.returncode is None:
                self._idle.append(process)

    async def _spawn(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            __name__,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(self._tokenizer)
        await process.stdout.readline()  # it is ready
        return process


def _main() -> None:
    tokenizer = load_tokenizer(msgspec.json.decode(sys.stdin.buffer.readline(), type=GrammarTokenizer))
    answer = b"null"
    while True:
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        try:
            compile_grammar(tokenizer, msgspec.json.decode(line, type=str))
            answer = b"null"
        except GrammarError as error:
            answer = msgspec.json.encode(str(error))


if __name__ == "__main__":
    _main()
