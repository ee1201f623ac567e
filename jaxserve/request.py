"""Requests and their outputs, as plain host data.

These structs cross the socket between the API process and the engine process, so they hold no HTTP objects, no text and
no arrays. Ranges are checked on construction, so every `Request` is valid.
"""

from enum import StrEnum

import msgspec

from jaxserve.sampling_params import SamplingParams

MAX_CHOICES = 128


class FinishReason(StrEnum):
    """The reason why a choice ended: OpenAI's values, plus `abort` and `error`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class GrammarTokenizer(msgspec.Struct, frozen=True, kw_only=True):
    """The tokenizer data that grammars need.

    Attributes:
        json: contents of `tokenizer.json`.
        vocab_size: vocabulary size of the model, which may be larger than the tokenizer's.
        eos_token_ids: tokens that may end the output once its grammar is complete.
    """

    json: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class ThinkingBudget(msgspec.Struct, frozen=True, kw_only=True):
    """A limit on an output's thinking tokens.

    Attributes:
        start: marker that opens thinking in the output.
        end: marker that closes thinking.
        early_end_markers: other markers that end thinking.
        allows_multiple: thinking may be opened again.
        in_reasoning: the prompt has already opened thinking.
        budget: maximum number of thinking tokens.
        end_token_ids: tokens that are forced when the budget is used up; their text contains `end`.
    """

    start: str
    end: str
    early_end_markers: tuple[str, ...] = ()
    allows_multiple: bool = False
    in_reasoning: bool
    budget: int
    end_token_ids: tuple[int, ...]


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter to load.

    Attributes:
        key: key for `Request.adapter_key`: the name, a colon, and a suffix that makes every load unique, so that an
            adapter may replace another of the same name.
        folder: folder of the adapter's files.
        pinned: never evicted from host memory or from its slot on the device.
    """

    key: str
    folder: str
    pinned: bool = False


def adapter_name(key: str) -> str:
    """Return the name by which clients select an adapter; names contain no colon."""
    return key.partition(":")[0]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt to continue `num_choices` times.

    Attributes:
        id: unique among live requests; created by the API process.
        prompt_token_ids: i32 ids, each inside the vocabulary, at least one.
        sampling: sampling parameters; the scheduler folds the choice index into the seed.
        eos_token_ids: the model's end-of-sequence tokens for this request.
        num_choices: OpenAI's `n`; the prompt is computed once.
        cache_salt: requests share cached prefixes only with the same salt.
        priority: higher runs earlier, and is preempted later, under the `priority` policy.
        grammar: grammar of the output, in llguidance's format; empty for none.
        thinking: limit on the output's thinking, if any.
        adapter_key: key of the LoRA adapter to apply; empty for none.
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
    adapter_key: str = ""

    @property
    def constrained(self) -> bool:
        """Whether the tokens that may be sampled depend on the output so far."""
        return bool(self.grammar) or self.thinking is not None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability (natural log) of one token and of its most likely alternatives."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Output that one step adds to one choice of a request.

    Exactly one delta of each choice of an accepted request carries a `finish_reason`.

    Attributes:
        request_id: the request's id.
        choice: index in [0, num_choices).
        token_ids: new output tokens, including the stop token.
        logprobs: one entry per new token if requested, else empty.
        prompt_logprobs: for prompt tokens [1, len); sent once, with the first delta.
        finish_reason: set on the last delta of the choice.
        matched_stop: the token id that ended the output, if one did.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        error: what went wrong when `finish_reason` is `error`.
        refused: the error was caused by the request, not by the server.
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
