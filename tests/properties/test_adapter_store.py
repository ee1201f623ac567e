"""Adapters are loaded and unloaded while requests run: each request gets its adapter's tokens, and nothing leaks."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxserve.errors import AdapterError
from jaxserve.request import AdapterSource, FinishReason, TokenDelta, adapter_name
from jaxserve.runner_protocol import LoadedAdapter
from tests.support.fakes import make_engine, shift_adapter
from tests.unit.test_engine import request

VOCAB_SIZE = 251
NUM_SLOTS = 3


class Adapters(RuleBasedStateMachine):
    """A state machine that acts on an engine as the API does, with the engine's adapter keys as names."""

    @initialize(
        max_loaded=st.one_of(st.none(), st.just(NUM_SLOTS), st.just(NUM_SLOTS + 1)),
        shifts=st.lists(st.integers(0, 200), max_size=8),
        dp_size=st.integers(1, 2),
        num_pages=st.integers(12, 64),
    )
    def start(self, max_loaded: int | None, shifts: list[int], dp_size: int, num_pages: int) -> None:
        self.max_loaded = max_loaded
        self.files: dict[str, int | None] = {}
        self.engine, self.runner = make_engine(
            num_slots=NUM_SLOTS,
            max_loaded=max_loaded,
            read=self.read,
            vocab_size=VOCAB_SIZE,
            dp_size=dp_size,
            context_length=48,
            num_pages=num_pages,
        )
        self.num_keys = self.num_requests = 0
        # The shifts of adapters that requests may name, by key.
        self.served: dict[str, int] = {}
        self.pinned: set[str] = set()
        # Keys that are being loaded (whether pinned) or unloaded, and running requests: (prompt, shift, max_tokens).
        self.loading: dict[str, bool] = {}
        self.unloading: set[str] = set()
        self.expected: dict[str, tuple[int, int, int]] = {}
        self.adapter_of: dict[str, str] = {}
        self.got: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.touched: set[str] = set()
        self.num_failures = 0
        for shift in shifts:
            self.load(shift, broken=False, pinned=False)
        while self.loading:
            self.step(1)

    def read(self, folder: str) -> LoadedAdapter:
        shift = self.files[folder]
        if shift is None:
            raise AdapterError("broken")
        return shift_adapter(shift)

    @rule(shift=st.integers(0, 200), broken=st.booleans(), pinned=st.booleans())
    def load(self, shift: int, broken: bool, pinned: bool) -> None:
        pins = len(self.pinned) + sum(self.loading.values()) + pinned
        if pins >= NUM_SLOTS - 1:
            pinned = False
        self.num_keys += 1
        key = f"a{self.num_keys}"
        self.files[key] = None if broken else shift
        self.loading[key] = pinned

        def answer(error: str | None) -> None:
            assert error == ("broken" if broken else None)
            del self.loading[key]
            if error is None:
                self.served[key] = shift
                self.pinned |= {key} if pinned else set()

        self.engine.load_adapter(AdapterSource(key=key, folder=key, pinned=pinned), answer)

    @rule(data=st.data())
    def unload(self, data: Any) -> None:
        if not self.served:
            return
        key = data.draw(st.sampled_from(sorted(self.served)))
        del self.served[key]
        self.unloading.add(key)

        def answer(error: str | None) -> None:
            assert error is None
            assert key not in self.adapter_of.values()
            assert key not in self.runner.adapters
            self.unloading.remove(key)
            self.pinned.discard(key)

        self.engine.unload_adapter(key, answer)

    @rule(data=st.data(), prompt=st.integers(0, VOCAB_SIZE - 1), length=st.integers(1, 9), tokens=st.integers(1, 30))
    def submit(self, data: Any, prompt: int, length: int, tokens: int) -> None:
        key = data.draw(st.sampled_from(["", *sorted(self.served)]))
        self.num_requests += 1
        name = f"r{self.num_requests}"
        self.expected[name] = prompt, self.served.get(key, 0), tokens
        self.got[name] = []
        if key:
            self.adapter_of[name] = key
        self.engine.add(request(name, prompt=(prompt,) * length, max_tokens=tokens, adapter=key, ignore_eos=True))

    @rule()
    def submit_what_is_gone(self) -> None:
        self.num_requests += 1
        self.engine.add(request(f"r{self.num_requests}", adapter="gone"))
        self.got[f"r{self.num_requests}"] = []

    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        if self.expected:
            name = data.draw(st.sampled_from(sorted(self.expected)))
            self.aborted.add(name)
            self.engine.abort(name)

    @rule(data=st.data(), shift=st.one_of(st.none(), st.integers(0, 200)))
    def touch(self, data: Any, shift: int | None) -> None:
        """Change or break the files of a loaded adapter."""
        if self.served:
            key = data.draw(st.sampled_from(sorted(self.served)))
            self.files[key] = shift
            self.touched.add(key)

    @rule()
    def fail(self) -> None:
        self.runner.fail_next = 1
        self.num_failures += 1

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            for delta in self.engine.step():
                self.take(delta)

    def take(self, delta: TokenDelta) -> None:
        name = delta.request_id
        self.got[name] += delta.token_ids
        if delta.finish_reason is None:
            return
        key = self.adapter_of.pop(name, "")
        if name not in self.expected:
            assert delta.refused
            assert delta.error == "the adapter 'gone' is not loaded"
            return
        prompt, shift, tokens = self.expected.pop(name)
        want = [(prompt + (1 + shift) * count) % VOCAB_SIZE for count in range(1, tokens + 1)]
        assert self.got[name] == want[: len(self.got[name])]
        if delta.finish_reason is FinishReason.LENGTH:
            assert self.got[name] == want
        elif delta.finish_reason is FinishReason.ABORT:
            assert name in self.aborted
        else:
            assert delta.error in (
                f"the adapter {adapter_name(key)!r} cannot be read again",
                "internal_error: the model step failed repeatedly for this request",
            )
            assert key in self.touched or self.num_failures > 1

    @invariant()
    def only_steps_that_must_fail_do(self) -> None:
        """Only injected failures cause resets; a step that loaded an adapter that is not in memory would add one."""
        if hasattr(self, "runner"):
            assert self.runner.num_resets <= self.num_failures

    @invariant()
    def memory_is_bounded(self) -> None:
        if hasattr(self, "runner") and self.max_loaded is not None:
            assert len(self.runner.adapters) <= self.max_loaded
            assert all(key in self.runner.adapters for key in self.pinned)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for key in list(self.served):
            if key not in self.unloading:
                del self.served[key]
                self.engine.unload_adapter(key, lambda error: None)
        for _ in range(100_000):
            if self.engine.idle:
                break
            self.step(1)
        assert self.engine.idle
        assert not self.expected
        assert not self.loading
        # No request is left, so all slots and all memory must be free.
        for key in list(self.served):
            self.engine.unload_adapter(key, lambda error: None)
        while not self.engine.idle:
            self.step(1)
        store = self.engine._adapters
        assert store is not None
        assert self.runner.adapters == {}
        assert sorted(store._slots._free) == list(range(1, NUM_SLOTS))
        assert not store._entries
        assert not store._uses


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(max_examples=500, stateful_step_count=30, deadline=None)
