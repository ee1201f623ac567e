"""What a client asked for and what it gets back, as plain host data.

These structs cross the socket between the API process and the engine process, so they hold no HTTP,
no text and no arrays. A `Request` that exists is valid: every range is checked when it is built.
"""

from enum import StrEnum

import msgspec

from jaxserve.sampling_params import SamplingParams

MAX_CHOICES = 128


class FinishReason(StrEnum):
    """Why a choice ended, in OpenAI's words, plus `abort` and `error`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class GrammarTokenizer(msgspec.Struct, frozen=True, kw_only=True):
    """The tokenizer, for grammars.

    Attributes:
        json: contents of its `tokenizer.json`.
        vocab_size: the model's, which may be larger than the tokenizer's.
        eos_token_ids: tokens that a finished grammar may end with.
    """

    json: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class ThinkingBudget(msgspec.Struct, frozen=True, kw_only=True):
    """A limit on the tokens of an output's thinking.

    Attributes:
        start: marker that opens it in the output.
        end: marker that closes it.
        early_end_markers: markers that end it as well.
        allows_multiple: it may be opened again.
        in_reasoning: the prompt has opened it already.
        budget: tokens of thinking, at most.
        end_token_ids: what is forced when they are used up; its text contains `end`.
    """

    start: str
    end: str
    early_end_markers: tuple[str, ...] = ()
    allows_multiple: bool = False
    in_reasoning: bool
    budget: int
    end_token_ids: tuple[int, ...]


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter that is to be loaded.

    Attributes:
        key: what `Request.adapter` refers to: the name, a colon, and a suffix that makes every load unique, so that
            an adapter may replace another of the same name.
        folder: where its files are.
        pinned: never leaves memory or its slot on the device.
    """

    key: str
    folder: str
    pinned: bool = False


def adapter_name(key: str) -> str:
    """What clients call an adapter; no name has a colon."""
    return key.partition(":")[0]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt to continue `num_choices` times.

    Attributes:
        id: unique among live requests; the API process makes it.
        prompt_token_ids: i32 ids, each inside the vocabulary, at least one.
        sampling: how to draw; the seed of choice i is folded in by the scheduler.
        eos_token_ids: the model's own end tokens for this request.
        num_choices: OpenAI's `n`; the prompt is computed once.
        cache_salt: requests share cached prefixes only with the same salt.
        priority: higher runs earlier, and is preempted later, under the `priority` policy.
        grammar: what the output must be, in llguidance's form; empty for anything.
        thinking: limit on the output's thinking, if any.
        adapter: LoRA adapter that is applied, by key; empty for none.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    num_choices: int = 1
    cache_salt: str = ""
    priority: int = 0
    grammar: str = ""
    thinking: ThinkingBudget | None = None
    adapter: str = ""

    @property
    def constrained(self) -> bool:
        """Whether some draws depend on the output before them."""
        return bool(self.grammar) or self.thinking is not None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability (natural log) of one token and of its likeliest alternatives."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What one step adds to one choice of a request.

    Exactly one delta of each choice of an accepted request carries a `finish_reason`.

    Attributes:
        request_id: the request's id.
        choice: index in [0, num_choices).
        token_ids: new output tokens, the stop token included.
        logprobs: one entry per new token when asked for, else empty.
        prompt_logprobs: for prompt tokens [1, len); sent once, with the first delta.
        finish_reason: set on the last delta of the choice.
        matched_stop: the token id that ended the output, if one did.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        error: what went wrong when `finish_reason` is `error`.
        refused: the error is the request's fault, not the server's.
    """

    request_id: str
    choice: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    refused: bool = False
