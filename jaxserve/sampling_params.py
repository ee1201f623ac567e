"""Sampling parameters, defined in one table that all other code uses.

The API reads the fields of `SAMPLING_FIELDS` from request bodies and from the model's defaults, `SamplingParams` checks
their ranges, and the runner packs those that kernels read into one array per step.
"""

from typing import NamedTuple

import msgspec

from jaxserve.errors import RequestError

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 64
GREEDY_TEMPERATURE = 1e-6


class SamplingField(NamedTuple):
    """A number or a flag that a request may set.

    Attributes:
        name: name in request bodies and in `SamplingParams`.
        low, high: minimum and maximum value; both None if `SamplingParams` checks the range itself.
        above_low: whether `low` itself is out of range.
        from_model: whether the model's own defaults may set it.
        device: name of the f32[B] array that kernels read; None if no kernel reads the value directly.
    """

    name: str
    low: float | None = None
    high: float | None = None
    above_low: bool = False
    from_model: bool = False
    device: str | None = None

    def check(self, value: float) -> None:
        """Raise RequestError if the value is out of range."""
        if self.low is None or self.high is None:
            return
        # `low <= value <= high` is false for NaN, so NaN and infinities are rejected, too.
        if not self.low <= value <= self.high:
            raise RequestError(f"{self.name} must be between {self.low} and {self.high}, got {value}", param=self.name)
        if self.above_low and value <= self.low:
            raise RequestError(f"{self.name} must be above {self.low:g}, got {value}", param=self.name)


SAMPLING_FIELDS: tuple[SamplingField, ...] = (
    SamplingField("temperature", 0.0, 100.0, from_model=True, device="temperature_B"),
    SamplingField("top_p", 0.0, 1.0, above_low=True, from_model=True, device="top_p_B"),
    SamplingField("min_p", 0.0, 1.0, from_model=True, device="min_p_B"),
    SamplingField("frequency_penalty", -2.0, 2.0, device="frequency_B"),
    SamplingField("presence_penalty", -2.0, 2.0, device="presence_B"),
    SamplingField("repetition_penalty", 0.0, 2.0, above_low=True, from_model=True, device="repetition_B"),
    SamplingField("top_k", from_model=True),
    SamplingField("min_tokens", 0, 2**31 - 1),
    SamplingField("ignore_eos"),
)
# Fields that only the endpoints set.
_OTHER_RANGES = (
    SamplingField("seed", -(2**63), 2**63 - 1),
    SamplingField("max_tokens", 0, 2**31 - 1),
)
# The fields that kernels read, in the order of the packed array.
DEVICE_FIELDS = tuple(field for field in SAMPLING_FIELDS if field.device is not None)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Parameters of sampling and stopping. Ranges: see `SAMPLING_FIELDS`.

    Attributes:
        temperature: divides the logits; below 1e-6 means greedy.
        top_k: keep the k most likely tokens; -1 keeps all.
        top_p: keep tokens while the probability mass before them is at most this.
        min_p: drop tokens below this fraction of the most likely kept token's probability.
        frequency_penalty: subtracted from a token's logit per earlier occurrence in the output.
        presence_penalty: subtracted once from the logit of a token that is in the output.
        repetition_penalty: divides positive and multiplies negative logits of output tokens.
        logit_bias: token id -> bias in [-100, 100]; -100 forbids the token.
        seed: sampling key; the same seed, position and logits give the same token anywhere.
        max_tokens: maximum number of output tokens; 0 computes the prompt only.
        min_tokens: number of output tokens before which end-of-sequence and stop tokens are forbidden.
        stop_token_ids: tokens that end the output, besides the model's end-of-sequence tokens.
        ignore_eos: disables every token stop.
        num_logprobs: number of alternatives to report per token (0..20); None for no log-probabilities.
        prompt_logprobs: report log-probabilities of the prompt's tokens as well.
    """

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict[int, float])
    seed: int = 0
    max_tokens: int = 128
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        for field in (*SAMPLING_FIELDS, *_OTHER_RANGES):
            field.check(getattr(self, field.name))
        if not (self.top_k == -1 or 1 <= self.top_k < 2**31):
            raise RequestError(f"top_k must be -1 (all) or at least 1, got {self.top_k}", param="top_k")
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
        """Whether the sample is an argmax."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def penalised(self) -> bool:
        """Whether earlier output tokens change the logits."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0 or self.repetition_penalty != 1

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise RequestError for ids outside the vocabulary: a device gather would clamp or wrap them silently."""
        for param, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"{param}: token id {token_id} is outside the vocabulary of {vocab_size}", param=param
                    )
