"""Decides what each step runs. Pure Python: no clock, no thread, no device.

There is no prefill phase and no decode phase: the number of computed tokens of every sequence catches up with its
number of tokens, within a token budget per step. Steps may be scheduled before the results of earlier ones are known;
a token in flight is a placeholder that the runner fills in on the device.

`update` must be called with the results in the order in which the steps were scheduled.
"""

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from itertools import islice
from typing import NamedTuple

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.request import FinishReason, Request, TokenDelta
from jaxserve.scheduling.adapter_slots import AdapterSlots
from jaxserve.scheduling.constraint import Constraint
from jaxserve.scheduling.output import NewToken, add_prompt_logprobs, forced_token, make_delta, sampled_token
from jaxserve.scheduling.pages import PagePool
from jaxserve.scheduling.prefix_cache import PrefixCache
from jaxserve.scheduling.quarantine import Quarantine
from jaxserve.scheduling.sequence import Sequence, cache_key_prefix_of
from jaxserve.scheduling.step_builder import StepBuilder
from jaxserve.step import SchedulerOutput, StepOutput

# The `lpm` policy sorts a queue of at most this many sequences; a longer queue is served in order of arrival.
_LPM_WINDOW = 128
# Maximum number of waiting sequences that a step considers for admission.
_ADMISSION_WINDOW = 256
# Sequences with several known output tokens run them together only if the step then averages at least this many tokens
# per row. Otherwise they run one token per step, because such a step is cheaper.
_MIN_TOKENS_PER_ROW = 2


class SchedulerStats(NamedTuple):
    """Current gauges and counters for the metrics."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_used_pages: int
    num_preemptions: int
    num_prompt_tokens: int
    num_cached_tokens: int


class _InFlight(NamedTuple):
    plan: SchedulerOutput
    sequences: tuple[Sequence, ...]
    num_preemptions: tuple[int, ...]


class Scheduler:
    """The waiting queue, the running sequences and their pages.

    Args:
        config: limits and policy.
        cache: size of the page pool, and whether prefixes are cached.
        adapters: slots of LoRA adapters, shared by the schedulers of all replicas; None without LoRA.
    """

    def __init__(self, config: SchedulerConfig, cache: CacheConfig, adapters: AdapterSlots | None = None) -> None:
        self._config = config
        self._page_size = cache.page_size
        self._adapters = adapters or AdapterSlots(1)
        self._pool = PagePool(cache.num_pages)
        self._prefixes = PrefixCache(self._pool, cache.page_size, enabled=cache.prefix_caching)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._in_flight: deque[_InFlight] = deque()
        self._free_rows = list(range(config.max_rows - 1, -1, -1))
        self._live: dict[str, list[Sequence]] = {}
        self._quarantine = Quarantine()
        self._outbox: list[TokenDelta] = []
        self._step = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to run and nothing to wait for."""
        return not (self._waiting or self._running or self._in_flight or self._outbox)

    @property
    def num_live(self) -> int:
        """Number of choices that have not ended."""
        return sum(map(len, self._live.values()))

    @property
    def stats(self) -> SchedulerStats:
        """Current gauges and counters."""
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_pages=self._pool.num_pages,
            num_used_pages=len({page for sequence in self._running for page in sequence.pages}),
            num_preemptions=self._num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
        )

    def num_cached_pages(self, request: Request) -> int:
        """Return the number of pages of the request's prompt that the prefix cache holds now."""
        return self._prefixes.match_length(cache_key_prefix_of(request), request.prompt_token_ids)

    def add(self, request: Request, constraints: SequenceOf[Constraint] = ()) -> None:
        """Queue a request. The caller has checked that it fits the context length and the page pool.

        Args:
            request: the request.
            constraints: one per choice, or empty.
        """
        prompt_owner: Sequence | None = None
        sequences: list[Sequence] = []
        for choice in range(request.num_choices):
            sequence = Sequence(request, choice, prompt_owner, constraints[choice] if constraints else None)
            prompt_owner = prompt_owner or sequence
            sequences.append(sequence)
        self._live[request.id] = sequences
        if self._config.policy == "priority":
            self._insert_by_priority(sequences)
        else:
            self._waiting.extend(sequences)
        for sequence in tuple(sequences):  # a sequence that ends immediately is removed from `sequences`
            self._advance(sequence, [])

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request or one choice of it; its rows and pages are free for the next step.

        Unknown ids are ignored, because the request may have ended already.
        """
        for sequence in list(self._live.get(request_id, ())):
            if choice is None or sequence.choice == choice:
                self._finish(sequence, FinishReason.ABORT)

    def schedule(self) -> SchedulerOutput | None:
        """Plan the next step; return None if no sequence can run."""
        step = StepBuilder(self._config)
        if self._quarantine:
            self._schedule_quarantined(self._quarantine.first, step)
        else:
            self._schedule_all_running(step)
            self._admit(step)
        if not step.rows:
            return None
        plan = step.finish(self._step, self._adapters.take_loads())
        self._step += 1
        self._in_flight.append(
            _InFlight(plan, tuple(step.sequences), tuple(sequence.num_preemptions for sequence in step.sequences))
        )
        return plan

    def update(self, output: StepOutput) -> None:
        """Process the results of the oldest step in flight."""
        plan, sequences, num_preemptions = self._in_flight.popleft()
        for index, (row, sequence) in enumerate(zip(plan.rows, sequences, strict=True)):
            if sequence.finished:
                continue
            discarded = row.samples and row.num_output_tokens < sequence.num_known_output_tokens
            if row.samples and not discarded:
                sequence.num_in_flight -= 1
            if not output.finite_B[index]:
                # Its pages may hold NaN, so they must not enter the prefix cache.
                self._finish_unsampled(sequence)
                continue
            end = row.num_computed_tokens + row.num_tokens
            self._quarantine.passed(sequence, end)
            preempted_since = sequence.num_preemptions != num_preemptions[index]
            if preempted_since and sequence.collects_prompt_logprobs:
                continue  # the whole prompt is recomputed and the token after it sampled again
            if not preempted_since:
                if index in output.prompt:
                    add_prompt_logprobs(sequence, output.prompt[index])
                self._index_pages(sequence, end)
            if row.samples and not discarded:
                self._advance(sequence, [sampled_token(sequence, index, output)])
            elif end == sequence.num_prompt_tokens and not sequence.request.sampling.max_tokens:
                self._finish(sequence, FinishReason.LENGTH)

    def constrained_rows(self) -> dict[int, Constraint]:
        """Return the constraints of the newest plan's rows that need a token mask, by index of the row in the plan.

        The results of all earlier steps must have been passed to `update`.
        """
        assert len(self._in_flight) == 1
        [(plan, sequences, num_preemptions)] = self._in_flight
        return {
            index: sequence.constraint
            for index, (row, sequence) in enumerate(zip(plan.rows, sequences, strict=True))
            if sequence.constraint is not None
            and row.samples
            and sequence.constraint.masked
            and not sequence.finished
            and row.num_output_tokens == sequence.num_known_output_tokens
            and sequence.num_preemptions == num_preemptions[index]
        }

    def take_deltas(self) -> list[TokenDelta]:
        """Return the updates for clients since the last call."""
        deltas, self._outbox = self._outbox, []
        return deltas

    @property
    def num_in_flight(self) -> int:
        """Number of sequences in steps whose results are not known yet."""
        return len({sequence for step in self._in_flight for sequence in step.sequences})

    @property
    def quarantined(self) -> bool:
        """Whether sequences must run alone, to find the one whose steps raise."""
        return bool(self._quarantine)

    def requeue_after_failure(self, *, alone: bool) -> None:
        """Requeue every running sequence after a step raised and the cache was lost.

        Steps in flight are dropped. A sequence that was alone in them is ended at its second such failure. Several
        sequences are run one at a time, until each has passed the point that it had reached.

        Args:
            alone: True if these steps ran a single sequence over all replicas.
        """
        in_flight = dict.fromkeys(sequence for step in self._in_flight for sequence in step.sequences)
        self._in_flight.clear()
        self._quarantine.add(in_flight)
        for sequence in [sequence for sequences in self._live.values() for sequence in sequences]:
            sequence.num_in_flight = 0
        for sequence in reversed(self._running.copy()):
            self._preempt(sequence)
        self._prefixes.flush()
        self._adapters.clear()
        if alone and len(in_flight) == 1:
            [sequence] = in_flight
            if self._quarantine.failed_alone(sequence):
                self._finish(
                    sequence,
                    FinishReason.ERROR,
                    error="internal_error: the model step failed repeatedly for this request",
                )

    def flush_cache(self) -> bool:
        """Forget cached prefixes; do nothing and return False while anything runs or waits."""
        if not self.idle:
            return False
        self._prefixes.flush()
        return True

    def _insert_by_priority(self, sequences: list[Sequence]) -> None:
        """Insert sequences behind the waiting ones of the same priority."""
        priority = sequences[0].request.priority
        index = len(self._waiting)
        while index and self._waiting[index - 1].request.priority < priority:
            index -= 1
        for offset, sequence in enumerate(sequences):
            self._waiting.insert(index + offset, sequence)

    def _put_back(self, sequence: Sequence) -> None:
        """Insert at the head of the queue; under `priority`, ahead of the waiting sequences of the same priority."""
        index = 0
        if self._config.policy == "priority":
            while index < len(self._waiting) and self._waiting[index].request.priority > sequence.request.priority:
                index += 1
        self._waiting.insert(index, sequence)

    def _schedule_all_running(self, step: StepBuilder) -> None:
        if self._catches_up_slowly():
            singles, others, limit = self._running.copy(), [], 1
        else:
            # Sequences that run one token go first: the token budget always covers all of them.
            singles = [sequence for sequence in self._running if not sequence.prefilling]
            others = [sequence for sequence in self._running if sequence.prefilling]
            limit = self._config.max_step_tokens
        for sequence in singles + others:
            if sequence.row is not None:  # else an earlier one has preempted it
                self._schedule_running(sequence, step, limit)

    def _catches_up_slowly(self) -> bool:
        """Whether too few known tokens are uncomputed to run several per row; see `_MIN_TOKENS_PER_ROW`."""
        counts = [sequence.num_uncomputed_tokens for sequence in self._running]
        in_prompt = any(sequence.num_computed_tokens < sequence.num_prompt_tokens for sequence in self._running)
        return not in_prompt and sum(counts) < _MIN_TOKENS_PER_ROW * len(counts)

    def _schedule_running(self, sequence: Sequence, step: StepBuilder, limit: int) -> None:
        if sequence.fully_scheduled:
            return
        count = min(step.token_budget_for(sequence), limit)
        if count == 0:
            return
        while not self._grow(sequence, sequence.num_computed_tokens + count):
            victim = self._victim()
            self._preempt(victim)
            step.drop(victim)
            if victim is sequence:
                return
        step.add(sequence, count)

    def _victim(self) -> Sequence:
        """Return the sequence to preempt: the newest or, under `priority`, the newest of the lowest priority."""
        if self._config.policy == "priority":
            return min(reversed(self._running), key=lambda sequence: sequence.request.priority)
        return self._running[-1]

    def _admit(self, step: StepBuilder) -> None:
        for sequence in self._candidates():
            if not self._free_rows or not step.num_tokens_left or not step.num_logits_rows_left:
                return
            if sequence.num_in_flight or self._waits_for_prefix(sequence):
                continue
            if not self._adapters.has_free_slot(sequence.request.adapter_key):
                continue  # those behind it may find a slot
            if not self._start(sequence, step):
                return

    def _start(self, sequence: Sequence, step: StepBuilder) -> bool:
        """Give a waiting sequence a row and pages and run it in this step; return False if either is missing."""
        if not self._free_rows or not self._adapters.has_free_slot(sequence.request.adapter_key):
            return False
        sequence.pages = self._match(sequence)
        sequence.num_indexed_pages = len(sequence.pages)
        sequence.num_computed_tokens = len(sequence.pages) * self._page_size
        count = step.token_budget_for(sequence)
        # Take pages for the whole prompt, not only for its first chunk: a half-computed prompt only blocks others.
        if not self._grow(sequence, sequence.num_tokens):
            self._prefixes.release(sequence.pages)
            sequence.pages = []
            sequence.num_indexed_pages = sequence.num_computed_tokens = 0
            return False
        self._waiting.remove(sequence)
        self._running.append(sequence)
        sequence.row = self._free_rows.pop()
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            if sequence.choice == 0:
                self._num_prompt_tokens += sequence.num_prompt_tokens
                self._num_cached_tokens += sequence.num_cached_tokens
        step.admit(sequence, self._adapters.hold(sequence.request.adapter_key))
        step.add(sequence, count)
        return True

    def _schedule_quarantined(self, sequence: Sequence, step: StepBuilder) -> None:
        """Plan a step of one sequence. The others do not run now, so they are preempted if it needs their resources."""
        if sequence.row is not None:
            self._schedule_running(sequence, step, self._config.max_step_tokens)
            return
        while not self._start(sequence, step) and self._running:
            self._preempt(self._running[-1])

    def _candidates(self) -> Iterator[Sequence]:
        waiting = list(islice(self._waiting, _ADMISSION_WINDOW))
        if self._config.policy == "lpm" and len(waiting) <= _LPM_WINDOW:
            waiting.sort(key=lambda s: -self._prefixes.match_length(s.cache_key_prefix, s.token_ids))
        yield from waiting

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Whether another sequence is about to compute a page that this one could share."""
        prompt_owner = sequence.prompt_owner
        if (
            prompt_owner is not None
            and not prompt_owner.finished
            and prompt_owner.num_computed_tokens < prompt_owner.num_prompt_tokens
        ):
            return True
        if not self._prefixes.enabled or sequence.collects_prompt_logprobs:
            return False
        pages = self._prefixes.match_length(sequence.cache_key_prefix, sequence.token_ids[:-1])
        end = (pages + 1) * self._page_size
        if end >= sequence.num_tokens:
            return False
        return any(
            other.num_indexed_pages <= pages
            and end <= other.num_prompt_tokens
            and other.cache_key_prefix == sequence.cache_key_prefix
            and other.token_ids[:end] == sequence.token_ids[:end]
            for other in self._running
        )

    def _match(self, sequence: Sequence) -> list[int]:
        """Hold and return the pages of a cached prefix; the last token is always computed, for its logits."""
        if sequence.collects_prompt_logprobs:
            return []
        return self._prefixes.match(sequence.cache_key_prefix, sequence.token_ids[:-1])

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take the missing pages for `num_tokens` tokens; if there are too few, take none and return False."""
        missing = -(-num_tokens // self._page_size) - len(sequence.pages)
        if missing <= 0:
            return True
        if not self._prefixes.make_room(missing):
            return False
        sequence.pages.extend(self._pool.take(missing))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Free the row and pages of a running sequence and requeue it; its tokens are kept and recomputed."""
        self._leave_row(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_indexed_pages = 0
        sequence.num_preemptions += 1
        if sequence.collects_prompt_logprobs:
            sequence.prompt_logprobs.clear()
        self._num_preemptions += 1
        self._put_back(sequence)

    def _leave_row(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        assert sequence.row is not None
        self._free_rows.append(sequence.row)
        self._adapters.release(sequence.request.adapter_key)
        sequence.row = None
        self._prefixes.release(sequence.pages)
        sequence.pages = []
        sequence.num_sent_pages = 0

    def _advance(self, sequence: Sequence, sampled: list[NewToken]) -> None:
        """Append sampled tokens and the forced ones after them, update the client, and end the sequence if complete."""
        new: list[NewToken] = []
        reason = None
        for token in sampled:
            new.append(token)
            reason = self._append(sequence, token.id)
        constraint = sequence.constraint
        if constraint is not None and reason is None and sequence.takes_forced_tokens:
            for token_id in constraint.forced()[
                : sequence.request.sampling.max_tokens - sequence.num_known_output_tokens
            ]:
                # Samples in flight for these positions are discarded; nothing has been computed from them yet.
                sequence.num_in_flight = 0
                assert sequence.num_computed_tokens <= len(sequence.token_ids)
                new.append(forced_token(sequence, token_id))
                reason = self._append(sequence, token_id)
                if reason is not None:
                    break
        if constraint is not None and constraint.error is not None:
            self._finish(sequence, FinishReason.ERROR, error=f"grammar: {constraint.error}", refused=True)
        elif new:
            self._outbox.append(make_delta(sequence, new, reason))
            if reason is not None:
                self._close(sequence)

    def _append(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        """Append a token; return the finish reason if it is the last one."""
        sequence.token_ids.append(token_id)
        sampling = sequence.request.sampling
        if sequence.constraint is not None:
            sequence.constraint.take(token_id)
            if sequence.constraint.finished:
                return FinishReason.STOP
        stops = not sampling.ignore_eos and sequence.stops_at(token_id)
        if stops and sequence.num_known_output_tokens >= sampling.min_tokens:
            return FinishReason.STOP
        if sequence.num_known_output_tokens >= sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def _finish(
        self, sequence: Sequence, reason: FinishReason, *, error: str | None = None, refused: bool = False
    ) -> None:
        self._outbox.append(make_delta(sequence, [], reason, error=error, refused=refused))
        self._close(sequence)

    def _finish_unsampled(self, sequence: Sequence) -> None:
        """End a sequence for which no token could be sampled."""
        sampling = sequence.request.sampling
        if sequence.constraint is not None and (sampling.logit_bias or sampling.min_tokens):
            error = "grammar, logit_bias and min_tokens together allow no token"
            self._finish(sequence, FinishReason.ERROR, error=error, refused=True)
        else:
            self._finish(sequence, FinishReason.ERROR, error="numerical_error: the model's output is not finite")

    def _close(self, sequence: Sequence) -> None:
        sequence.finished = True
        if sequence.row is not None:
            self._leave_row(sequence)
        else:
            self._waiting.remove(sequence)
        self._quarantine.remove(sequence)
        siblings = self._live[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[sequence.request.id]

    def _index_pages(self, sequence: Sequence, num_computed: int) -> None:
        """Insert pages that are full of known tokens into the prefix cache."""
        full = min(num_computed, len(sequence.token_ids)) // self._page_size
        if sequence.row is None or full <= sequence.num_indexed_pages:
            return
        self._prefixes.insert(
            sequence.cache_key_prefix, sequence.token_ids, sequence.pages[:full], sequence.num_indexed_pages
        )
        sequence.num_indexed_pages = full
