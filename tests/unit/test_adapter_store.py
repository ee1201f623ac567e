"""Cases of `AdapterStore` that its property test does not cover: the order of waiting, and reading on a thread."""

import threading

from jaxserve.engine.engine import Engine
from jaxserve.request import AdapterSource
from jaxserve.runner_protocol import LoadedAdapter
from tests.support.fakes import InlineExecutor, make_engine, shift_adapter
from tests.unit.test_engine import finish, request, tokens


def test_adapter_load_is_not_starved_by_requests_for_another() -> None:
    """Adapter `a` is evicted once its running requests have ended; its later requests wait until `b` is loaded."""
    engine, _ = make_engine(num_slots=2, adapters="a", max_loaded=1)
    answers: list[str | None] = []
    engine.add(request("0", adapter="a", max_tokens=8))
    engine.step()
    engine.load_adapter(AdapterSource(key="b", folder="b"), answers.append)
    ends: list[str] = []
    for number in range(1, 40):
        engine.add(request(str(number), adapter="a", max_tokens=8))
        ends += [delta.request_id for delta in engine.step() if delta.finish_reason is not None]
        if answers:
            break
    assert answers == [None]
    ends += [delta.request_id for delta in finish(engine) if delta.finish_reason is not None]
    assert ends == [str(number) for number in range(len(ends))]


def test_requests_run_while_an_adapter_is_read() -> None:
    """Reading an adapter does not block steps, and the answer comes once it is read."""
    reading, go_on = threading.Event(), threading.Event()

    def read(folder: str) -> LoadedAdapter:
        reading.set()
        assert go_on.wait(30)
        return shift_adapter(3)

    engine, _ = make_engine(num_slots=2, read=read, executor=None)
    answers: list[str | None] = []
    engine.load_adapter(AdapterSource(key="a", folder="a"), answers.append)
    engine.step()
    assert reading.wait(30)
    engine.add(request("base"))
    while not any(delta.finish_reason for delta in engine.step()):
        pass
    assert not answers
    go_on.set()
    finish(engine)
    assert answers == [None]
    engine.add(request("tuned", adapter="a"))
    assert tokens(finish(engine), "tuned") == [7, 11, 15, 19]


def _loaded(engine: Engine, key: str) -> str | None:
    answers: list[str | None] = []
    engine.load_adapter(AdapterSource(key=key, folder=key), answers.append)
    finish(engine)
    [answer] = answers
    return answer


def test_a_reader_that_breaks_is_reported() -> None:
    def read(folder: str) -> LoadedAdapter:
        raise OSError("the disk is gone")

    engine, _ = make_engine(num_slots=2, read=read, executor=InlineExecutor())
    assert _loaded(engine, "a") == "it cannot be read: OSError('the disk is gone')"
    assert _loaded(engine, "a") is not None  # the key is free


def test_a_pinned_adapter_keeps_its_slot() -> None:
    engine, runner = make_engine(num_slots=3, adapters="abc")
    engine.load_adapter(AdapterSource(key="p", folder="p", pinned=True), lambda error: None)
    finish(engine)
    for number, adapter in enumerate("pabcabcp"):
        engine.add(request(str(number), adapter=adapter))
        finish(engine)
    loads = [load.key for plan in runner.plans for load in plan.adapter_loads]
    assert loads == list("pabcabc")


def test_unload_waits_for_queued_requests() -> None:
    engine, runner = make_engine(num_slots=2, adapters="ab")
    engine.add(request("first", adapter="a", max_tokens=20))
    engine.step()
    engine.add(request("second", adapter="b"))
    gone: list[str | None] = []
    engine.unload_adapter("b", gone.append)
    engine.add(request("late", adapter="b"))
    deltas = engine.step()
    assert [(delta.request_id, delta.refused) for delta in deltas if delta.finish_reason] == [("late", True)]
    while not gone:
        deltas += engine.step()
    assert gone == [None]
    assert tokens(deltas, "second") == [4, 5, 6, 7]
    assert list(runner.adapters) == ["a"]
    engine.unload_adapter("b", gone.append)
    assert gone[1:] == ["the adapter 'b' is not loaded"]
