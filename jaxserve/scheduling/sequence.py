"""One choice of one request while it waits and runs. Belongs to the scheduler and crosses nothing."""

from jaxserve.request import Request, TokenLogprobs
from jaxserve.scheduling.constraint import Constraint
from jaxserve.scheduling.prefix_cache import CacheKeyPrefix

_MASK = 2**64 - 1


def choice_seed(seed: int, choice: int) -> int:
    """Seed of a request's choice, u64: choice 0 has the request's own, the others a mix (SplitMix64)."""
    if choice == 0:
        return seed & _MASK
    mixed = (seed + choice * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def cache_key_prefix_of(request: Request) -> CacheKeyPrefix:
    """Which requests may share its pages: those with the same key prefix."""
    return (request.adapter, request.cache_salt)


class Sequence:
    """Tokens, pages and progress of one choice.

    Attributes:
        request: what it belongs to.
        choice: index in the request.
        prompt_owner: the choice that computes the prompt for this one, if there are several.
        constraint: what its output may be, if that is limited.
        token_ids: prompt and known output.
        num_in_flight: draws sent to the device whose tokens are not known yet.
        num_computed_tokens: tokens whose keys and values are, or will be once sent steps ran, in the pages.
        num_indexed_pages: full pages given to the prefix cache.
        num_cached_tokens: prompt tokens taken from the prefix cache on first admission; None before it.
        num_failed_steps: steps that raised while it was alone in them.
        num_tokens_at_failure: computed tokens when it was last in a step that raised.
        num_preemptions: how often it lost its row; results of steps from before are not about its pages.
        pages: held pages, in order.
        num_sent_pages: pages the runner knows of.
        row: row while running, else None.
        prompt_logprobs: collected so far.
        finished: no step may use it any more.
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
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt, known output and draws in flight."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Output tokens, those in flight included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """Known output."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_known_output_tokens(self) -> int:
        """Output tokens, those in flight left out."""
        return len(self.token_ids) - self.num_prompt_tokens

    def stops_at(self, token_id: int) -> bool:
        """Whether it is an end token of the model or the request."""
        return token_id in self.request.eos_token_ids or token_id in self.request.sampling.stop_token_ids

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that a step could run now."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def takes_forced_tokens(self) -> bool:
        """Whether tokens that its constraint forces are taken without a draw.

        Penalties count draws on the device, and prompt log-probabilities come with the first draw.
        """
        sampling = self.request.sampling
        return self.constraint is not None and not (sampling.penalised or sampling.prompt_logprobs)

    @property
    def prefilling(self) -> bool:
        """Whether more than the newest token is still to be computed."""
        return self.num_uncomputed_tokens > 1

    @property
    def fully_scheduled(self) -> bool:
        """Whether all that it may draw is drawn or in flight, and nothing else is left to compute."""
        max_tokens = self.request.sampling.max_tokens
        # The last output token is never run: no draw follows it.
        return self.num_output_tokens >= max_tokens and self.num_uncomputed_tokens <= min(1, max_tokens)

    @property
    def cache_key_prefix(self) -> CacheKeyPrefix:
        """Who may share its pages."""
        return cache_key_prefix_of(self.request)

    @property
    def collects_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be computed; the first choice does it for all."""
        wanted = self.request.sampling.prompt_logprobs and self.choice == 0
        return wanted and len(self.prompt_logprobs) < self.num_prompt_tokens - 1
