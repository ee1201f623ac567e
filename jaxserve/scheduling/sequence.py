"""One choice of one request while it waits and runs. Private to the scheduler; never sent to another process."""

from jaxserve.request import Request, TokenLogprobs
from jaxserve.scheduling.constraint import Constraint
from jaxserve.scheduling.prefix_cache import CacheKeyPrefix

_MASK = 2**64 - 1


def choice_seed(seed: int, choice: int) -> int:
    """Return the u64 seed of a choice: choice 0 uses the request's seed, the others mix in `choice` (SplitMix64)."""
    if choice == 0:
        return seed & _MASK
    mixed = (seed + choice * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def cache_key_prefix_of(request: Request) -> CacheKeyPrefix:
    """Return the request's key prefix in the prefix cache; requests with the same one may share pages."""
    return (request.adapter_key, request.cache_salt)


class Sequence:
    """Tokens, pages and progress of one choice.

    Attributes:
        request: the request that it belongs to.
        choice: index of the choice in the request.
        prompt_owner: the sequence of choice 0, which computes the prompt for the others; None for choice 0.
        constraint: constraint on the output, if any.
        token_ids: prompt and known output tokens.
        num_in_flight: output tokens that the device was told to sample and the host does not know yet.
        num_computed_tokens: tokens whose keys and values are in the pages, or will be after the steps in flight.
        num_indexed_pages: full pages given to the prefix cache.
        num_cached_tokens: prompt tokens found in the prefix cache on first admission; None before that.
        num_failed_steps: steps that raised while it was alone in them.
        num_tokens_at_failure: largest `num_computed_tokens` at which it was in a step that raised.
        num_preemptions: number of preemptions; results of steps before the last one do not describe its current pages.
        pages: held pages, in order.
        num_sent_pages: pages already sent to the runner.
        row: row while running, else None.
        prompt_logprobs: log-probabilities of prompt tokens, as far as collected.
        finished: the sequence has ended; no step may use it any more.
    """

    __slots__ = (
        "choice",
        "constraint",
        "finished",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_failed_steps",
        "num_in_flight",
        "num_indexed_pages",
        "num_preemptions",
        "num_sent_pages",
        "num_tokens_at_failure",
        "pages",
        "prompt_logprobs",
        "prompt_owner",
        "request",
        "row",
        "seed",
        "token_ids",
    )

    def __init__(
        self, request: Request, choice: int, prompt_owner: "Sequence | None", constraint: Constraint | None = None
    ) -> None:
        self.request = request
        self.choice = choice
        self.prompt_owner = prompt_owner
        self.constraint = constraint
        self.seed = choice_seed(request.sampling.seed, choice)
        self.token_ids = list(request.prompt_token_ids)
        self.num_in_flight = 0
        self.num_computed_tokens = 0
        self.num_indexed_pages = 0
        self.num_cached_tokens: int | None = None
        self.num_failed_steps = 0
        self.num_tokens_at_failure = 0
        self.num_preemptions = 0
        self.pages: list[int] = []
        self.num_sent_pages = 0
        self.row: int | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.finished = False

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens."""
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Number of tokens: prompt, known output and in flight."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Number of output tokens, including those in flight."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """Known output tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_known_output_tokens(self) -> int:
        """Number of output tokens, excluding those in flight."""
        return len(self.token_ids) - self.num_prompt_tokens

    def stops_at(self, token_id: int) -> bool:
        """Whether `token_id` is an end token of the model or the request."""
        return token_id in self.request.eos_token_ids or token_id in self.request.sampling.stop_token_ids

    @property
    def num_uncomputed_tokens(self) -> int:
        """Number of tokens that a step could run now."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def takes_forced_tokens(self) -> bool:
        """Whether tokens that its constraint forces are appended without sampling.

        Not with penalties, since the device counts only sampled tokens, nor with prompt log-probabilities, which are
        returned with the first sampled token.
        """
        sampling = self.request.sampling
        return self.constraint is not None and not (sampling.penalised or sampling.prompt_logprobs)

    @property
    def prefilling(self) -> bool:
        """Whether more than the newest token is still to be computed."""
        return self.num_uncomputed_tokens > 1

    @property
    def fully_scheduled(self) -> bool:
        """Whether all output tokens are known or in flight, and nothing else is left to compute."""
        max_tokens = self.request.sampling.max_tokens
        # The last output token is never run, because nothing is sampled after it.
        return self.num_output_tokens >= max_tokens and self.num_uncomputed_tokens <= min(1, max_tokens)

    @property
    def cache_key_prefix(self) -> CacheKeyPrefix:
        """See `cache_key_prefix_of`."""
        return cache_key_prefix_of(self.request)

    @property
    def collects_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be computed; choice 0 does it for all choices."""
        wanted = self.request.sampling.prompt_logprobs and self.choice == 0
        return wanted and len(self.prompt_logprobs) < self.num_prompt_tokens - 1
