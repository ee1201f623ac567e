"""The scheduler loses, leaks and repeats nothing in any order of requests, aborts, failures and late results."""

from collections import deque
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.request import FinishReason, Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduling.adapter_slots import AdapterSlots
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.step import PromptLogprobs, SchedulerOutput, StepOutput

EOS = 5


OPTIONS = st.fixed_dictionaries(
    {
        "prompt_logprobs": st.booleans(),
        "ignore_eos": st.booleans(),
        "frequency_penalty": st.sampled_from([0.0, 1.0]),
    }
)


class Script:
    """A constraint with a fixed set of allowed tokens at each position, which is finished after the last position.

    Attributes:
        taken: the tokens so far.
    """

    def __init__(self, positions: list[frozenset[int]]) -> None:
        self._positions = positions
        self.taken: list[int] = []
        self.masked = True
        self.error: str | None = None

    @property
    def finished(self) -> bool:
        return len(self.taken) == len(self._positions)

    @property
    def allowed(self) -> frozenset[int]:
        return self._positions[len(self.taken)]

    def take(self, token_id: int) -> None:
        assert token_id in self.allowed
        self.taken.append(token_id)

    def forced(self) -> list[int]:
        out: list[int] = []
        for allowed in self._positions[len(self.taken) :]:
            if len(allowed) > 1:
                break
            out += allowed
        return out


class SchedulerMachine(RuleBasedStateMachine):
    """A state machine around a scheduler, with a client that acts at random and a device that answers late."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        num_pages=st.integers(6, 24),
        max_rows=st.integers(1, 5),
        spare_tokens=st.integers(0, 12),
        policy=st.sampled_from(["fcfs", "lpm", "priority"]),
        caching=st.booleans(),
        num_slots=st.integers(2, 4),
        eviction=st.sampled_from(["lru", "fifo"]),
    )
    def start(
        self,
        *,
        page_size: int,
        num_pages: int,
        max_rows: int,
        spare_tokens: int,
        policy: str,
        caching: bool,
        num_slots: int,
        eviction: Any,
    ) -> None:
        self.context = page_size * num_pages
        self.config = SchedulerConfig(
            max_rows=max_rows,
            max_step_tokens=max_rows + spare_tokens,
            context_length=self.context,
            policy=policy,  # type: ignore[arg-type]
        )
        self.page_size = page_size
        self.num_pages = num_pages
        self.adapters = AdapterSlots(num_slots, eviction)
        self.scheduler = Scheduler(
            self.config, CacheConfig(page_size=page_size, num_pages=num_pages, prefix_caching=caching), self.adapters
        )
        # The adapter in each slot of the device, and the slot of each row.
        self.slots = {0: ""}
        self.slot_of_row: dict[int, int] = {}
        self.in_flight: deque[SchedulerOutput] = deque()
        self.requests: dict[str, Request] = {}
        self.ends: dict[tuple[str, int], list[FinishReason]] = {}
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.prompt_logprobs: dict[str, int] = {}
        self.aborted: set[str] = set()
        self.scripts: dict[str, list[Script]] = {}
        self.masks: dict[int, frozenset[int]] = {}

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=30),
        max_tokens=st.integers(0, 12),
        num_choices=st.sampled_from([1, 1, 1, 3]),
        options=OPTIONS,
        priority=st.integers(0, 2),
        adapter=st.sampled_from(["", "", "a", "b", "c", "d"]),
        script=st.none() | st.lists(st.frozensets(st.integers(0, EOS), min_size=1, max_size=2), min_size=1, max_size=8),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        num_choices: int,
        options: dict[str, Any],
        priority: int,
        adapter: str,
        script: list[frozenset[int]] | None,
    ) -> None:
        prompt = prompt[: self.context - 1]
        request = Request(
            id=f"r{len(self.requests)}",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=min(max_tokens, self.context - len(prompt)),
                num_logprobs=1 if options["prompt_logprobs"] else None,
                **options,
            ),
            eos_token_ids=(EOS,),
            num_choices=num_choices,
            priority=priority,
            adapter_key=adapter,
        )
        self.requests[request.id] = request
        for choice in range(num_choices):
            self.ends[request.id, choice] = []
            self.outputs[request.id, choice] = []
        if script is not None:
            self.scripts[request.id] = [Script(script) for _ in range(num_choices)]
        self.scheduler.add(request, self.scripts.get(request.id, ()))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.aborted.add(name)
        self.scheduler.abort(name)

    # The masks of a step are known only when it is the only one in flight; the engine works in the same way.
    @precondition(lambda self: not self.scripts or len(self.in_flight) < 2)
    @rule()
    def schedule(self) -> None:
        plan = self.scheduler.schedule()
        if plan is None:
            return
        self.in_flight.append(plan)
        self._record_masks()
        self._check_adapters(plan)
        assert plan.num_tokens <= self.config.max_step_tokens
        assert sum(row.num_logits_rows for row in plan.rows) <= self.config.max_rows
        assert len({row.row for row in plan.rows}) == len(plan.rows)
        singles = [row.num_tokens == 1 for row in plan.rows]
        assert singles == sorted(singles, reverse=True), "rows of one token come first"

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        plan = self.in_flight.popleft()
        count = len(plan.rows)
        tokens = self._masked(data.draw(st.lists(st.integers(0, EOS), min_size=count, max_size=count)))
        broken = data.draw(st.sampled_from([-1] * 9 + [0]))
        self.scheduler.update(self._output(plan, tokens, [index != broken for index in range(count)]))
        self._record_masks()

    @precondition(lambda self: self.in_flight)
    @rule(alone=st.booleans())
    def lose_the_cache(self, alone: bool) -> None:
        self.in_flight.clear()
        self.masks = {}
        self.slots = {0: ""}
        self.scheduler.requeue_after_failure(alone=alone)

    @invariant()
    def each_choice_ends_once(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for delta in self.scheduler.take_deltas():
            key = delta.request_id, delta.choice
            assert not self.ends[key], "a delta after the last one"
            self.outputs[key].extend(delta.token_ids)
            self.prompt_logprobs[delta.request_id] = self.prompt_logprobs.get(delta.request_id, 0) + len(
                delta.prompt_logprobs
            )
            if delta.finish_reason is not None:
                self.ends[key].append(delta.finish_reason)

    @invariant()
    def pages_add_up(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        pool, tree = self.scheduler._pool, self.scheduler._prefixes
        holders = [0] * self.num_pages
        for sequence in self.scheduler._running:
            assert len(set(sequence.pages)) == len(sequence.pages)
            for page in sequence.pages:
                holders[page] += 1
        for page in tree._nodes:
            holders[page] += 1
        assert holders == pool._holders
        assert holders.count(0) == pool.num_free

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if self.scheduler.idle:
                break
            if not self.scripts or len(self.in_flight) < 2:
                self.schedule()
            if self.in_flight:
                plan = self.in_flight.popleft()
                tokens = self._masked([0] * len(plan.rows))
                self.scheduler.update(self._output(plan, tokens, [True] * len(plan.rows)))
                self._record_masks()
            self.each_choice_ends_once()
            self.pages_add_up()
        assert self.scheduler.idle, "every request ends"
        for name, choice in self.ends:
            self.ended_as_it_should(name, choice)
        assert not any(self.adapters._num_rows.values())
        assert self.scheduler.flush_cache()
        assert self.scheduler._pool.num_free == self.num_pages

    def ended_as_it_should(self, name: str, choice: int) -> None:
        reasons = self.ends[name, choice]
        assert len(reasons) == 1
        sampling = self.requests[name].sampling
        output = self.outputs[name, choice]
        assert len(output) <= sampling.max_tokens
        match reasons[0]:
            case FinishReason.LENGTH:
                assert len(output) == sampling.max_tokens
            case FinishReason.STOP if name in self.scripts and self.scripts[name][choice].finished:
                pass
            case FinishReason.STOP:
                assert output[-1] == EOS
                assert not sampling.ignore_eos
            case FinishReason.ABORT:
                assert name in self.aborted
        if name in self.scripts:
            assert self.scripts[name][choice].taken == output
        if sampling.prompt_logprobs and choice == 0 and reasons[0] in (FinishReason.LENGTH, FinishReason.STOP):
            assert self.prompt_logprobs[name] == len(self.requests[name].prompt_token_ids) - 1

    def _check_adapters(self, plan: SchedulerOutput) -> None:
        """Check that the slot of every row holds the adapter of its request."""
        for load in plan.adapter_loads:
            assert 0 < load.slot < self.adapters._num_slots
            self.slots[load.slot] = load.key
        self.slot_of_row |= {new.row: new.adapter_slot for new in plan.new_rows}
        for row, sequence in zip(plan.rows, self.scheduler._in_flight[-1].sequences, strict=True):
            assert self.slots[self.slot_of_row[row.row]] == sequence.request.adapter_key

    def _record_masks(self) -> None:
        """Record which tokens may be sampled in the only step in flight."""
        if len(self.in_flight) != 1:
            return
        constrained = self.scheduler.constrained_rows()
        assert all(self.in_flight[0].rows[index].samples for index in constrained)
        self.masks = {index: script.allowed for index, script in constrained.items()}  # type: ignore[attr-defined]

    def _masked(self, tokens: list[int]) -> list[int]:
        """Return sampled tokens, with those that the step's masks forbid replaced by allowed ones."""
        masks, self.masks = self.masks, {}
        return [
            token if index not in masks or token in masks[index] else min(masks[index])
            for index, token in enumerate(tokens)
        ]

    @staticmethod
    def _output(plan: SchedulerOutput, tokens: list[int], finite: list[bool]) -> StepOutput:
        top = np.zeros((len(plan.rows), 20))
        return StepOutput(
            token_ids_B=np.array(tokens, np.int32),
            finite_B=np.array(finite, bool),
            logprobs_B=top[:, 0],
            top_ids_BJ=top.astype(np.int32),
            top_logprobs_BJ=top,
            prompt={
                index: PromptLogprobs(np.zeros(size), np.zeros((size, 20), np.int32), np.zeros((size, 20)))
                for index, row in enumerate(plan.rows)
                if (size := len(row.prompt_targets))
            },
        )


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
