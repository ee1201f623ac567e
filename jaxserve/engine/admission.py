"""Requests on their way to the scheduler: each waits for its grammar to be compiled, then for its LoRA adapter.

Runs on the engine's thread. A request is here or in the scheduler, never in both.
"""

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxserve.lora.store import AdapterStore
from jaxserve.request import FinishReason, GrammarTokenizer, Request, TokenDelta, adapter_name
from jaxserve.structured.compiler import GrammarCompiler
from jaxserve.structured.constraint import OutputConstraint

logger = logging.getLogger(__name__)

_COMPILE_POLL_S = 0.005


class Admitted(NamedTuple):
    """A request that the scheduler can take.

    Attributes:
        request: the request.
        constraints: one per choice; empty for a request that is not constrained.
    """

    request: Request
    constraints: Sequence[OutputConstraint]


@dataclass
class _Waiting:
    """A request that waits.

    Attributes:
        request: the request.
        grammar: the compilation it waits for; None while it waits for its adapter.
        constraints: the compiled constraints.
    """

    request: Request
    grammar: Future[list[OutputConstraint]] | None = None
    constraints: Sequence[OutputConstraint] = ()


class Admission:
    """Owns a request from `add` until it is admitted or ended.

    Args:
        vocab_size: vocabulary size of the model.
        adapters: LoRA adapters that requests may name; None where they may name none.
    """

    def __init__(self, vocab_size: int, adapters: AdapterStore | None) -> None:
        self._vocab_size = vocab_size
        self._adapters = adapters
        self._grammars: GrammarCompiler | None = None
        self._waiting: dict[str, _Waiting] = {}
        self._ended: list[TokenDelta] = []

    @property
    def idle(self) -> bool:
        """Whether `work` and `take_deltas` would do nothing."""
        return not (self._waiting or self._ended) and (self._adapters is None or self._adapters.idle)

    @property
    def num_waiting(self) -> int:
        """Choices of the requests that wait."""
        return sum(waiting.request.num_choices for waiting in self._waiting.values())

    def use_tokenizer(self, tokenizer: GrammarTokenizer) -> None:
        """Accept constrained requests from now on."""
        self._grammars = GrammarCompiler(tokenizer, self._vocab_size)

    def add(self, request: Request) -> list[Admitted]:
        """Take a request; it is returned if it has nothing to wait for.

        Raises:
            RuntimeError: the request is constrained, and `use_tokenizer` was not called.
        """
        if request.adapter_key and (self._adapters is None or not self._adapters.acquire(request)):
            error = f"the adapter {adapter_name(request.adapter_key)!r} is not loaded"
            self._end(request, FinishReason.ERROR, error=error, refused=True)
            return []
        if request.constrained and self._grammars is None:
            raise RuntimeError("a constrained request needs a tokenizer")
        waiting = self._waiting[request.id] = _Waiting(request)
        if self._grammars is None or not request.constrained:
            return self._await_adapter(waiting)
        waiting.grammar = self._grammars.start(request)
        return []

    def abort(self, request_id: str, choice: int | None) -> bool:
        """End a request that waits; False if it is not here.

        The abort of one choice is ignored, because clients abort a choice only after some output of it.
        """
        waiting = self._waiting.get(request_id)
        if waiting is None:
            return False
        if choice is None:
            del self._waiting[request_id]
            if waiting.grammar is not None:
                waiting.grammar.cancel()
            self._end(waiting.request, FinishReason.ABORT)
        return True

    def work(self, *, device_idle: bool) -> list[Admitted]:
        """Take what was compiled and read, and return the requests that were waiting for it.

        Args:
            device_idle: there is no other work, so this may wait a few milliseconds.
        """
        admitted = self._take_compiled(device_idle=device_idle)
        if self._adapters is None:
            return admitted
        for request, error in self._adapters.work(wait_for_reading=device_idle and not admitted):
            waiting = self._waiting.pop(request.id, None)
            if waiting is None:  # aborted meanwhile
                continue
            if error is None:
                admitted.append(Admitted(request, waiting.constraints))
            else:
                self._end(request, FinishReason.ERROR, error=error)
        return admitted

    def take_deltas(self) -> list[TokenDelta]:
        """The ends of requests that were never admitted."""
        deltas, self._ended = self._ended, []
        return deltas

    def release(self, deltas: Iterable[TokenDelta]) -> None:
        """Release the adapters of choices that have ended."""
        if self._adapters is not None:
            for delta in deltas:
                self._adapters.release(delta)

    def fill_masks(self, constraints: list[Any]) -> np.ndarray:
        """Token masks of constraints; see `GrammarCompiler.fill`."""
        assert self._grammars is not None
        return self._grammars.fill(constraints)

    def _take_compiled(self, *, device_idle: bool) -> list[Admitted]:
        compiling = [waiting for waiting in self._waiting.values() if waiting.grammar is not None]
        if compiling and device_idle:
            # Short, because messages may come.
            wait([waiting.grammar for waiting in compiling if waiting.grammar is not None], _COMPILE_POLL_S)
        admitted: list[Admitted] = []
        for waiting in compiling:
            if waiting.grammar is None or not waiting.grammar.done():
                continue
            error = waiting.grammar.exception()
            if error is None:
                waiting.constraints, waiting.grammar = waiting.grammar.result(), None
                admitted += self._await_adapter(waiting)
            else:
                logger.warning("failed to compile a grammar that had passed validation: %s", error)
                del self._waiting[waiting.request.id]
                self._end(waiting.request, FinishReason.ERROR, error=f"grammar: {error}", refused=True)
        return admitted

    def _await_adapter(self, waiting: _Waiting) -> list[Admitted]:
        request = waiting.request
        if request.adapter_key:
            assert self._adapters is not None
            if not self._adapters.start(request):
                return []
        del self._waiting[request.id]
        return [Admitted(request, waiting.constraints)]

    def _end(self, request: Request, reason: FinishReason, **fields: Any) -> None:
        self._ended += [
            TokenDelta(request_id=request.id, choice=choice, finish_reason=reason, **fields)
            for choice in range(request.num_choices)
        ]
