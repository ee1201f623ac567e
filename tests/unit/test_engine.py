"""The engine's step loop over a `FakeRunner`, whose tokens are predictable and whose steps can be made to fail."""

import pytest

from jaxserve.request import FinishReason, Request, TokenDelta
from jaxserve.sampling_params import SamplingParams
from tests.support.fakes import make_engine


def request(
    name: str,
    prompt: tuple[int, ...] = (1, 2, 3),
    max_tokens: int = 4,
    priority: int = 0,
    adapter: str = "",
    **options: object,
) -> Request:
    return Request(
        id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, **options),  # type: ignore[arg-type]
        priority=priority,
        adapter_key=adapter,
    )


def finish(engine: object, limit: int = 1000) -> list[TokenDelta]:
    deltas: list[TokenDelta] = []
    for _ in range(limit):
        if engine.idle:  # type: ignore[attr-defined]
            return deltas
        deltas += engine.step()  # type: ignore[attr-defined]
    raise AssertionError("the engine did not become idle")


def tokens(deltas: list[TokenDelta], name: str) -> list[int]:
    return [token for delta in deltas if delta.request_id == name for token in delta.token_ids]


def test_continues_and_ends() -> None:
    engine, _ = make_engine()
    engine.add(request("a"))
    deltas = finish(engine)
    assert tokens(deltas, "a") == [4, 5, 6, 7]
    assert [delta.finish_reason for delta in deltas][-1] is FinishReason.LENGTH


def test_engine_dispatches_next_step_before_previous_result() -> None:
    engine, runner = make_engine()
    engine.add(request("a"))
    assert engine.step() == []
    engine.step()
    assert runner.plans[1].rows[0].token_ids == (-1,)


def test_prompts_are_cut_to_the_budget_and_mixed_with_decode() -> None:
    engine, runner = make_engine(max_step_tokens=16)
    engine.add(request("a", max_tokens=20))
    engine.step()
    engine.add(request("b", prompt=tuple(range(40))))
    deltas = finish(engine)
    assert max(plan.num_tokens for plan in runner.plans) == 16
    assert any(len(plan.rows) == 2 and plan.rows[1].num_tokens == 15 for plan in runner.plans)
    assert tokens(deltas, "b") == [40, 41, 42, 43]


def test_preemption_changes_no_token() -> None:
    """The page pool holds one and a half requests: later ones are preempted and finish all the same."""
    engine, _ = make_engine(num_pages=12, page_size=4, context_length=48)
    for name in ("a", "b", "c"):
        engine.add(request(name, prompt=(ord(name),) * 8, max_tokens=24))
    deltas = finish(engine)
    assert engine.stats.num_preemptions > 0
    for name in ("a", "b", "c"):
        assert tokens(deltas, name) == [ord(name) + 1 + i for i in range(24)]


def test_choices_compute_their_prompt_once() -> None:
    engine, runner = make_engine(max_step_tokens=64)
    engine.add(Request(id="a", prompt_token_ids=(7,) * 33, sampling=SamplingParams(max_tokens=2), num_choices=3))
    finish(engine)
    assert sum(plan.num_tokens for plan in runner.plans) == 33 + 2 * 1 + 3 * 1


def test_waits_for_a_prefix_that_is_being_computed() -> None:
    engine, runner = make_engine(max_step_tokens=16)
    engine.add(request("a", prompt=(7,) * 41))
    engine.step()
    engine.add(request("b", prompt=(7,) * 41))
    deltas = finish(engine)
    prefill = sum(row.num_tokens for plan in runner.plans for row in plan.rows if row.num_tokens > 1 or row.samples)
    assert prefill < 41 + 41
    assert next(delta for delta in deltas if delta.request_id == "b").num_cached_tokens == 40


def test_a_failing_step_is_tried_again() -> None:
    engine, runner = make_engine()
    engine.add(request("a"))
    runner.fail_next = 2
    assert tokens(finish(engine), "a") == [4, 5, 6, 7]
    assert runner.num_resets == 2


@pytest.mark.parametrize("dp_size", [1, 2])
def test_only_requests_that_fail_their_steps_end_with_error(dp_size: int) -> None:
    """The failing requests, one of them with two choices, run next to good ones that come early and late."""
    engine, runner = make_engine(max_step_tokens=64, dp_size=dp_size)
    runner.poison = 13
    engine.add(request("long", prompt=(100, 101), max_tokens=30))
    deltas = [delta for _ in range(5) for delta in engine.step()]
    engine.add(Request(id="bad", prompt_token_ids=(12, 13), sampling=SamplingParams(max_tokens=4), num_choices=2))
    for name, prompt in (("a", (1, 2)), ("worse", (13,)), ("b", (1, 2))):
        engine.add(request(name, prompt=prompt))
    deltas += finish(engine)
    engine.add(request("late", prompt=(13, 13)))
    deltas += finish(engine)
    ends = {(delta.request_id, delta.choice): delta.finish_reason for delta in deltas if delta.finish_reason}
    assert len(ends) == sum(delta.finish_reason is not None for delta in deltas)
    bad = {("bad", 0), ("bad", 1), ("worse", 0), ("late", 0)}
    assert {key for key, reason in ends.items() if reason is FinishReason.ERROR} == bad
    assert tokens(deltas, "a") == tokens(deltas, "b") == [3, 4, 5, 6]
    assert tokens(deltas, "long") == list(range(102, 132))


def test_a_request_that_fails_late_is_found_as_well() -> None:
    """The prefill succeeds; the step that runs the poisoned sampled token fails."""
    engine, runner = make_engine(max_step_tokens=64)
    runner.poison = 20
    engine.add(request("a", prompt=(16, 17), max_tokens=30))
    engine.add(request("b", prompt=(50, 51), max_tokens=10))
    runner.poison_samples = True
    deltas = finish(engine)
    ends = {delta.request_id: delta.finish_reason for delta in deltas if delta.finish_reason}
    assert ends == {"a": FinishReason.ERROR, "b": FinishReason.LENGTH}
    assert tokens(deltas, "b") == list(range(52, 62))


def test_all_run_together_again_after_one_failure() -> None:
    engine, runner = make_engine(max_step_tokens=64)
    for name in ("a", "b", "c", "d"):
        engine.add(request(name, max_tokens=40))
    for _ in range(10):
        engine.step()
    runner.fail_next = 1
    deltas = finish(engine)
    assert all(tokens(deltas, name)[-1] == 43 for name in ("a", "b", "c", "d"))
    assert len(runner.plans) < 60


def test_a_device_that_fails_every_step_is_given_up() -> None:
    engine, runner = make_engine()
    engine.add(request("a"))
    runner.fail_next = 100
    with pytest.raises(RuntimeError, match="on fire"):
        finish(engine)
    assert runner.num_resets == 3


def test_replicas_balance_requests_and_reuse_prefixes() -> None:
    engine, runner = make_engine(dp_size=2, max_step_tokens=64)
    prompts = {"a": (1,) * 9, "b": (2,) * 9}
    for name, prompt in prompts.items():
        engine.add(request(name, prompt=prompt))
    engine.step()
    assert [len(plan.rows) for plan in runner.plans] == [1, 1]
    deltas = finish(engine)
    assert tokens(deltas, "a") == [2, 3, 4, 5]
    assert tokens(deltas, "b") == [3, 4, 5, 6]
    engine.add(request("c", prompt=prompts["b"]))
    assert finish(engine)[0].num_cached_tokens == 8
    assert engine.stats.num_pages == 128
    assert engine.flush_cache()


def test_priority_decides_who_runs_and_who_gives_way() -> None:
    engine, runner = make_engine(num_pages=12, page_size=4, context_length=48, policy="priority")
    for name, priority in (("low", 0), ("high", 5), ("middle", 3)):
        engine.add(request(name, prompt=(ord(name[0]),) * 8, max_tokens=24, priority=priority))
    deltas = finish(engine)
    ends = [delta.request_id for delta in deltas if delta.finish_reason]
    assert ends == ["high", "middle", "low"]
    assert engine.stats.num_preemptions > 0
    assert runner.plans[0].rows[0].token_ids[0] == ord("h")


def test_a_row_that_is_not_finite_leaves_nothing_in_the_cache() -> None:
    engine, runner = make_engine()
    runner.not_finite = {0}
    engine.add(request("a", prompt=(1,) * 10))
    [delta] = finish(engine)
    assert delta.finish_reason is FinishReason.ERROR
    assert "numerical_error" in (delta.error or "")
    runner.not_finite = set()
    engine.add(request("b", prompt=(1,) * 10))
    assert finish(engine)[0].num_cached_tokens == 0


def test_abort_of_one_choice() -> None:
    engine, _ = make_engine()
    engine.add(Request(id="a", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=9), num_choices=2))
    engine.step()
    engine.abort("a", 1)
    ends = {delta.choice: delta.finish_reason for delta in finish(engine) if delta.finish_reason}
    assert ends == {0: FinishReason.LENGTH, 1: FinishReason.ABORT}
    engine.abort("a")
    assert engine.idle
