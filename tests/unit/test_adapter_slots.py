"""The assignment of adapters to slots; the scheduler's property test checks it with random requests."""

import pytest

from jaxserve.scheduling.adapter_slots import AdapterSlots
from jaxserve.step import AdapterLoad
from tests.support.fakes import make_engine
from tests.unit.test_engine import finish, request, tokens


def use(slots: AdapterSlots, *adapters: str) -> None:
    for adapter in adapters:
        slots.hold(adapter)
        slots.release(adapter)


@pytest.mark.parametrize(("policy", "gone"), [("lru", "b"), ("fifo", "a")])
def test_slot_eviction_policy(policy: str, gone: str) -> None:
    slots = AdapterSlots(3, policy)  # type: ignore[arg-type]
    use(slots, "a", "b", "a")
    before = {load.key: load.slot for load in slots.take_loads()}
    use(slots, "c")
    assert slots.take_loads() == (AdapterLoad(before[gone], "c"),)


def test_slot_in_use_is_not_evicted() -> None:
    slots = AdapterSlots(2)
    assert slots.hold("a") == slots.hold("a") == 1
    assert slots.has_free_slot("a")
    assert slots.has_free_slot("")
    assert not slots.has_free_slot("b")
    slots.release("a")
    assert not slots.has_free_slot("b")
    slots.release("a")
    assert slots.hold("b") == 1


def test_an_adapter_stays_until_its_slot_is_needed() -> None:
    slots = AdapterSlots(2)
    use(slots, "a", "a")
    assert len(slots.take_loads()) == 1
    slots.clear()
    use(slots, "a")
    assert len(slots.take_loads()) == 1


def test_a_row_that_waits_for_a_slot_blocks_no_other() -> None:
    engine, runner = make_engine(num_slots=2, adapters="ab")
    engine.add(request("first", max_tokens=30, adapter="a"))
    engine.step()
    engine.add(request("second", max_tokens=2, adapter="b"))
    engine.add(request("third", max_tokens=2))
    engine.add(request("fourth", max_tokens=2, adapter="a"))
    deltas = finish(engine)
    ends = [delta.request_id for delta in deltas if delta.finish_reason is not None]
    assert set(ends[:2]) == {"third", "fourth"}
    assert ends[2:] == ["first", "second"]
    assert tokens(deltas, "second") == [4, 5]
    loads = [load for plan in runner.plans for load in plan.adapter_loads]
    assert loads == [AdapterLoad(1, "a"), AdapterLoad(1, "b")]


def test_prefixes_are_not_shared_between_adapters() -> None:
    engine, _ = make_engine(num_slots=3, adapters="ab", max_step_tokens=64)
    prompt = (7,) * 33
    cached = []
    for name, adapter in (("base", ""), ("one", "a"), ("other", "b"), ("again", "a")):
        engine.add(request(name, prompt=prompt, adapter=adapter))
        cached.append(max(delta.num_cached_tokens for delta in finish(engine)))
    assert cached == [0, 0, 0, 32]
