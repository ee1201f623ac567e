"""Compiles grammars outside the engine's step loop, and computes the token masks of several rows in parallel."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from jaxserve.request import GrammarTokenizer, Request
from jaxserve.structured.constraint import OutputConstraint, ThinkingState

_MAX_CACHED = 64
_COMPILE_THREADS = 2


class GrammarError(ValueError):
    """A grammar cannot be used; the message states the reason."""


def load_tokenizer(tokenizer: GrammarTokenizer) -> LLTokenizer:
    """Build llguidance's tokenizer; takes about a second for a large vocabulary."""
    return LLTokenizer(tokenizer.json, n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.eos_token_ids))


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Return a matcher at the start of the grammar.

    Raises:
        GrammarError: the grammar is invalid, too large, or accepts nothing.
    """
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if not matcher.is_error():
        # Computing the first mask detects a grammar that accepts nothing.
        matcher.compute_bitmask()
    if matcher.is_error():
        error = matcher.get_error().split("\n<state>")[0][:500]
        raise GrammarError("the grammar accepts no output" if error == "NoExtensionBias" else error)
    return matcher


class GrammarCompiler:
    """Creates the constraints of requests.

    Args:
        tokenizer: tokenizer of the served model.
        vocab_size: number of tokens in a mask.
    """

    def __init__(self, tokenizer: GrammarTokenizer, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._pool = ThreadPoolExecutor(_COMPILE_THREADS, thread_name_prefix="grammar")
        self._executor = LLExecutor()
        self._tokenizer = self._pool.submit(load_tokenizer, tokenizer)
        self._matcher = lru_cache(_MAX_CACHED)(self._compile)

    def start(self, request: Request) -> "Future[list[OutputConstraint]]":
        """Return a future of one constraint per choice, which fails with GrammarError."""
        return self._pool.submit(self._build, request)

    def fill(self, constraints: Sequence[OutputConstraint]) -> np.ndarray:
        """Return bit masks i32[C, W] of the tokens that each constraint allows, computed in parallel."""
        bits_CW = np.zeros((len(constraints), self._num_words), np.int32)
        matchers: list[tuple[LLMatcher, int]] = []
        for index, constraint in enumerate(constraints):
            only = constraint.only_token
            if only is not None:
                bits_CW.view(np.uint32)[index, only // 32] = 1 << only % 32
            elif constraint.matcher is not None:
                matchers.append((constraint.matcher, index))
        if matchers:
            self._executor.unsafe_compute_mask_ptr(matchers, bits_CW.ctypes.data, self._num_words * 4, len(constraints))
        return bits_CW

    def _build(self, request: Request) -> list[OutputConstraint]:
        tokenizer = self._tokenizer.result()
        matcher = self._matcher(request.grammar) if request.grammar else None

        def token_bytes(token_id: int) -> bytes:
            return tokenizer.decode_bytes([token_id])

        return [
            OutputConstraint(
                None if matcher is None else matcher.deep_copy(),
                None if request.thinking is None else ThinkingState(request.thinking),
                token_bytes,
            )
            for _ in range(request.num_choices)
        ]

    def _compile(self, grammar: str) -> LLMatcher:
        return compile_grammar(self._tokenizer.result(), grammar)
