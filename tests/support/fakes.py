"""Fakes that a test can control: a runner without a device, and an engine client without an engine process."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

import numpy as np

from jaxserve.config import CacheConfig, SchedulePolicy, SchedulerConfig
from jaxserve.engine.client import AdapterAnswers, Streams, TokenStream
from jaxserve.engine.engine import Engine
from jaxserve.engine.messages import EngineInfo, EngineStats
from jaxserve.errors import OverloadedError, UnavailableError
from jaxserve.lora.store import AdapterStore, OnDone
from jaxserve.request import AdapterSource, GrammarTokenizer, Request
from jaxserve.runner_protocol import LoadedAdapter, Runner, loaded_adapter
from jaxserve.scheduling.adapter_slots import AdapterSlots
from jaxserve.scheduling.data_parallel import DataParallelScheduler
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.step import ConstrainedRows, Plans, PromptLogprobs, SchedulerOutput, StepOutput

NUM_TOP = 20


class FakeStep:
    """A step whose result is known immediately, before and after sampling."""

    def __init__(self, runner: "FakeRunner", plans: Plans, outputs: tuple[StepOutput | None, ...]) -> None:
        self._runner = runner
        self._plans = plans
        self._outputs = outputs

    def sample(self, constrained: Sequence[ConstrainedRows | None]) -> "FakeStep":
        """Replace the token of each constrained row with the first allowed id from that token on, wrapping around."""
        for replica, (plan, output, rows) in enumerate(zip(self._plans, self._outputs, constrained, strict=True)):
            for row, bits_W in zip(rows.rows, rows.bits_CW, strict=True) if plan and output and rows else ():
                allowed_V = np.unpackbits(bits_W.view(np.uint8), bitorder="little").nonzero()[0].tolist()
                sampled = int(output.token_ids_B[row])
                token = min(allowed_V, key=lambda token: (token - sampled) % self._runner.vocab_size)
                output.token_ids_B[row] = token
                self._runner.last[replica, plan.rows[row].row] = token
        return self

    def result(self) -> tuple[StepOutput | None, ...]:
        return self._outputs


class InlineExecutor(Executor):
    """An executor that runs each function immediately, in the thread that submits it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


_INLINE = InlineExecutor()


def shift_adapter(shift: int) -> LoadedAdapter:
    """Return an adapter that makes `FakeRunner` add `shift` to each sampled token."""
    return loaded_adapter({("shift",): np.array(shift)})


class FakeRunner:
    """A runner with predictable outputs: it samples `last token + 1`, plus an adapter's shift, modulo the vocabulary.

    Attributes:
        plans: the scheduler outputs received, step by step and replica by replica.
        fail_next: number of the next forward passes and resets that raise.
        poison: a token id; every step that has it among its input tokens raises.
        poison_samples: whether a step also raises if the previous step sampled `poison`.
        not_finite: state rows whose logits are NaN.
        adapters: the loaded adapters by key.
        slots: the adapter loaded into each slot.
        slot_of: the adapter slot of each (replica, row).
    """

    def __init__(self, vocab_size: int = 256) -> None:
        self.vocab_size = vocab_size
        self.last: dict[tuple[int, int], int] = {}
        self.adapters: dict[str, LoadedAdapter] = {}
        self.slots: dict[int, LoadedAdapter] = {}
        self.slot_of: dict[tuple[int, int], int] = {}
        self.plans: list[SchedulerOutput] = []
        self.fail_next = 0
        self.poison: int | None = None
        self.poison_samples = False
        self.num_resets = 0
        self.not_finite: set[int] = set()

    def forward(self, plans: Plans) -> FakeStep:
        assert any(plan is not None for plan in plans)
        self.plans += [plan for plan in plans if plan is not None]
        for load in (load for plan in plans if plan is not None for load in plan.adapter_loads):
            self.slots[load.slot] = self.adapters[load.key]
        for replica, plan in enumerate(plans):
            self.slot_of |= {(replica, new.row): new.adapter_slot for new in plan.new_rows} if plan is not None else {}
        if self.fail_next:
            self.fail_next -= 1
            raise RuntimeError("the device is on fire")
        return FakeStep(self, plans, tuple(plan and self._sample(replica, plan) for replica, plan in enumerate(plans)))

    def _sample(self, replica: int, plan: SchedulerOutput) -> StepOutput:
        tokens: list[int] = []
        prompt: dict[int, PromptLogprobs] = {}
        for index, row in enumerate(plan.rows):
            if self.poison in row.token_ids:
                raise RuntimeError("a poisoned token")
            last = row.token_ids[-1] if row.token_ids[-1] >= 0 else self.last[replica, row.row]
            if self.poison_samples and last == self.poison:
                raise RuntimeError("a poisoned draw")
            slot = self.slot_of[replica, row.row]
            shift = int(self.slots[slot].leaves["shift",]) if slot else 0
            tokens.append((last + 1 + shift) % self.vocab_size)
            if row.samples:
                self.last[replica, row.row] = tokens[-1]
            if row.prompt_targets:
                count = len(row.prompt_targets)
                prompt[index] = PromptLogprobs(
                    np.full(count, -1.0), np.tile(np.arange(NUM_TOP), (count, 1)), np.full((count, NUM_TOP), -2.0)
                )
        count = len(plan.rows)
        return StepOutput(
            token_ids_B=np.array(tokens),
            finite_B=np.array([row.row not in self.not_finite for row in plan.rows], bool),
            logprobs_B=np.full(count, -0.5),
            top_ids_BJ=np.tile(np.arange(NUM_TOP), (count, 1)),
            top_logprobs_BJ=np.full((count, NUM_TOP), -0.5),
            prompt=prompt,
        )

    def add_adapter(self, key: str, adapter: LoadedAdapter) -> None:
        self.adapters[key] = adapter

    def remove_adapter(self, key: str) -> None:
        del self.adapters[key]

    def reset(self) -> None:
        self.num_resets += 1
        self.slots.clear()
        if self.fail_next:
            self.fail_next -= 1
            raise RuntimeError("the device is on fire")


def make_engine(
    *,
    max_rows: int = 4,
    max_step_tokens: int = 16,
    page_size: int = 4,
    num_pages: int = 64,
    context_length: int = 128,
    dp_size: int = 1,
    policy: SchedulePolicy = "fcfs",
    vocab_size: int = 256,
    num_slots: int = 1,
    adapters: Sequence[str] = (),
    max_loaded: int | None = None,
    read: Callable[[str], LoadedAdapter] = lambda folder: shift_adapter(0),
    executor: Executor | None = _INLINE,
    wrap: Callable[[Runner], Runner] = lambda runner: runner,
) -> tuple[Engine, FakeRunner]:
    """Return an engine over `wrap(runner)`, and `runner`, a new `FakeRunner`."""
    runner = FakeRunner(vocab_size)
    limits = SchedulerConfig(
        max_rows=max_rows, max_step_tokens=max_step_tokens, context_length=context_length, policy=policy
    )
    cache = CacheConfig(page_size=page_size, num_pages=num_pages)
    slots = AdapterSlots(num_slots)
    schedulers = [Scheduler(limits, cache, slots) for _ in range(dp_size)]
    wrapped = wrap(runner)
    store = AdapterStore(read, wrapped, slots, max_loaded, executor) if num_slots > 1 else None
    for key in adapters:
        assert store is not None
        wrapped.add_adapter(key, read(key))
        store.add(AdapterSource(key=key, folder=key), read(key))
    return Engine(wrapped, DataParallelScheduler(schedulers), runner.vocab_size, store), runner


class FakeEngineClient:
    """An `EngineClient` in this process: an asyncio task steps the engine while it has work.

    Attributes:
        lost: why the engine is lost, or None; set it to make the engine look dead.
        lose_after: number of steps after which the engine is lost, or None.
        submitted: every request, in order.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int = 512,
        max_live: int | None = None,
        adapters: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        self._engine, self.runner = make_engine(
            max_rows=8,
            max_step_tokens=64,
            page_size=16,
            num_pages=256,
            context_length=context_length,
            vocab_size=vocab_size,
            num_slots=8,
            adapters=adapters,
            **options,
        )
        self.submitted: list[Request] = []
        self._streams = Streams()
        self._adapter_answers = AdapterAnswers()
        self._max_live = max_live
        self._task: asyncio.Task[None] | None = None
        self.lost: str | None = None
        self.lose_after: int | None = None
        self._info = EngineInfo(
            architecture="LlamaForCausalLM",
            vocab_size=vocab_size,
            context_length=context_length,
            max_rows=8,
            page_size=16,
            num_pages=256,
            dtype="float32",
            device="fake",
            eos_token_ids=(vocab_size - 1,),
        )

    @property
    def info(self) -> EngineInfo:
        self.check_ready()
        return self._info

    @property
    def stats(self) -> EngineStats:
        return EngineStats(**self._engine.stats._asdict())

    @property
    def num_live(self) -> int:
        return self._streams.num_live

    def check_ready(self) -> None:
        if self.lost is not None:
            raise UnavailableError(self.lost)

    def check_capacity(self, num_choices: int) -> None:
        self.check_ready()
        if self._max_live is not None and self.num_live + num_choices > self._max_live:
            raise OverloadedError("full")

    def use_tokenizer(self, tokenizer: GrammarTokenizer) -> None:
        self._engine.use_tokenizer(tokenizer)

    def submit(self, request: Request) -> TokenStream:
        self.check_capacity(request.num_choices)
        self.submitted.append(request)
        stream = self._streams.add(request, self._close)
        self._engine.add(request)
        self._wake()
        return stream

    def abort(self, request_id: str, choice: int | None = None) -> None:
        self._engine.abort(request_id, choice)

    async def flush_cache(self) -> bool:
        return self._engine.flush_cache()

    async def load_adapter(self, source: AdapterSource) -> None:
        await self._ask(source.key, partial(self._engine.load_adapter, source))

    async def unload_adapter(self, key: str) -> None:
        await self._ask(key, partial(self._engine.unload_adapter, key))

    async def _ask(self, key: str, ask: Callable[[OnDone], None]) -> None:
        def send() -> None:
            ask(partial(self._adapter_answers.report, key))
            self._wake()

        await self._adapter_answers.ask(key, send)

    def _wake(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def lose(self, reason: str) -> None:
        """Act as if the engine process had ended."""
        self.lost = reason
        self._streams.fail_all(reason)

    def _close(self, request_id: str) -> None:
        if self._streams.remove(request_id):
            self._engine.abort(request_id)

    async def _run(self) -> None:
        while not self._engine.idle and self.lost is None:
            for delta in self._engine.step():
                self._streams.deliver(delta)
            if self.lose_after is not None:
                self.lose_after -= 1
                if self.lose_after == 0:
                    self.lose("the engine process ended with code -9")
            await asyncio.sleep(0)
