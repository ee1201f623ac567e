"""What a client asked for and what it gets back, as plain host data.

These structs cross the socket between the API process and the engine process, so they hold no HTTP,
no text and no arrays. A `Request` that exists is valid: every range is checked when it is built.
"""

from enum import StrEnum

import msgspec

from jaxserve.errors import RequestError

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_CHOICES = 128
MAX_STOP_TOKEN_IDS = 64
GREEDY_TEMPERATURE = 1e-6


class FinishReason(StrEnum):
    """Why a choice ended, in OpenAI's words, plus `abort` and `error`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is drawn and when to stop. Ranges as in `validate`.

    Attributes:
        temperature: divides the logits; below 1e-6 means greedy.
        top_k: keep the k likeliest tokens; -1 keeps all.
        top_p: keep tokens while the probability mass before them is at most this.
        min_p: drop tokens below this share of the likeliest kept token's probability.
        frequency_penalty: subtracted per earlier occurrence in the output.
        presence_penalty: subtracted once for a token that is in the output.
        repetition_penalty: divides positive and multiplies negative logits of output tokens.
        logit_bias: token id -> bias in [-100, 100]; -100 forbids the token.
        seed: key of the draw; the same seed, position and logits give the same token anywhere.
        max_tokens: output tokens at most; 0 computes the prompt only.
        min_tokens: end-of-sequence and stop tokens are forbidden until this many are out.
        stop_token_ids: tokens that end the output besides the model's own.
        ignore_eos: switches every token stop off.
        num_logprobs: None for none, else how many alternatives to report per token (0..20).
        prompt_logprobs: report log-probabilities of the prompt's tokens as well.
    """

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    max_tokens: int = 128
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        # `lo <= x <= hi` is false for NaN, so NaN and infinities are refused with everything else.
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                raise RequestError(f"{name} must be between {low} and {high}, got {value}", param=name)
        if not (self.top_k == -1 or 1 <= self.top_k < 2**31):
            raise RequestError(f"top_k must be -1 (all) or at least 1, got {self.top_k}", param="top_k")
        if self.top_p <= 0:
            raise RequestError(f"top_p must be above 0, got {self.top_p}", param="top_p")
        if self.repetition_penalty <= 0:
            raise RequestError(
                f"repetition_penalty must be above 0, got {self.repetition_penalty}", param="repetition_penalty"
            )
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", param="min_tokens"
            )
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MAX_LOGPROBS:
            raise RequestError(
                f"at most {MAX_LOGPROBS} log-probabilities per token, got {self.num_logprobs}", param="logprobs"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} entries, the limit is {MAX_LOGIT_BIAS}", param="logit_bias"
            )
        for token_id, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise RequestError(
                    f"logit_bias of token {token_id} must be between -100 and 100, got {bias}", param="logit_bias"
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"stop_token_ids has {len(self.stop_token_ids)} entries, the limit is {MAX_STOP_TOKEN_IDS}",
                param="stop_token_ids",
            )

    @property
    def greedy(self) -> bool:
        """Whether the draw is an argmax."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def penalised(self) -> bool:
        """Whether earlier output tokens change the logits."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0 or self.repetition_penalty != 1

    def check_token_ids(self, vocab_size: int) -> None:
        """Refuse ids outside the vocabulary: a device gather would clamp or wrap them silently."""
        for param, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"{param}: token id {token_id} is outside the vocabulary of {vocab_size}", param=param
                    )


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.0, 2.0),
    ("seed", -(2**63), 2**63 - 1),
    ("max_tokens", 0, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
)


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


class Thinking(msgspec.Struct, frozen=True, kw_only=True):
    """A limit on the tokens of an output's thinking.

    Attributes:
        start: marker that opens it in the output.
        end: marker that closes it.
        interrupts: markers that end it as well.
        reopens: it may be opened again.
        inside: the prompt has opened it already.
        budget: tokens of thinking, at most.
        end_token_ids: what is forced when they are used up; its text contains `end`.
    """

    start: str
    end: str
    interrupts: tuple[str, ...] = ()
    reopens: bool = False
    inside: bool
    budget: int
    end_token_ids: tuple[int, ...]


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter that is to be loaded.

    Attributes:
        key: what requests call it in `Request.adapter`: its name, and behind a colon what tells it from others that
            had the name; never used twice, so that one may replace another.
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
    thinking: Thinking | None = None
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
