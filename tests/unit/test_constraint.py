"""Thinking budgets, grammars in the engine, and forced tokens that are not sampled."""

import json
from pathlib import Path

import pytest

from jaxserve.engine.engine import Engine
from jaxserve.request import FinishReason, GrammarTokenizer, Request, ThinkingBudget, TokenDelta
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured.compiler import GrammarError, compile_grammar, load_tokenizer
from jaxserve.structured.constraint import ThinkingState
from jaxserve.text.tokenizer import load_tokenizer as load_text_tokenizer
from tests.support.fakes import make_engine
from tests.support.tiny import EOS, VOCAB_SIZE, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> GrammarTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_text_tokenizer(folder).for_grammars(VOCAB_SIZE, [EOS])


def grammar(lark: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def budget(tokens: int, *, in_reasoning: bool = True) -> ThinkingState:
    ids = tuple(b"</t>")
    return ThinkingState(
        ThinkingBudget(start="<t>", end="</t>", in_reasoning=in_reasoning, budget=tokens, end_token_ids=ids)
    )


def feed(limit: ThinkingState, text: bytes) -> int | None:
    """Return the number of bytes fed until the end of thinking is forced, or None."""
    for index, byte in enumerate(text):
        if limit.queue:
            return index
        limit.take(byte, bytes([byte]))
    return len(text) if limit.queue else None


def test_thinking_is_closed_after_its_budget() -> None:
    limit = budget(5)
    assert feed(limit, b"abcdefgh") == 5
    for token in b"</t>":
        assert limit.queue[0] == token
        limit.take(token, bytes([token]))
    assert feed(limit, b"a long answer that is not thinking") is None


def test_thinking_that_ends_by_itself_is_left_alone() -> None:
    assert feed(budget(10), b"abc</t>and a long answer") is None
    assert feed(budget(10), b"abc</tand a long thought") == 10


def test_thinking_that_the_model_opens_itself_is_counted_from_there() -> None:
    assert feed(budget(3, in_reasoning=False), b"well <t>abcdef") == len("well <t>abc")
    assert feed(budget(3, in_reasoning=False), b"an answer without any thinking") is None


def test_no_budget_at_all() -> None:
    assert budget(0).queue
    assert feed(budget(0, in_reasoning=False), b"x<t>y") == 4


def test_thinking_that_is_opened_again_has_no_new_budget() -> None:
    ids = tuple(b"</t>")
    thinking = ThinkingBudget(
        start="<t>", end="</t>", in_reasoning=True, allows_multiple=True, budget=3, end_token_ids=ids
    )
    limit = ThinkingState(thinking)
    assert feed(limit, b"abcd") == 3
    for token in b"</t>":
        limit.take(token, bytes([token]))
    assert feed(limit, b"so <t>x") == 6
    other = ThinkingState(
        ThinkingBudget(
            start="<t>", end="</t>", early_end_markers=("<c>",), in_reasoning=True, budget=4, end_token_ids=ids
        )
    )
    assert feed(other, b"a<c>and a long call") is None


def test_a_character_is_never_cut() -> None:
    assert feed(budget(2), "a漢字".encode()) == 4


def run(engine: Engine, limit: int = 4000) -> list[TokenDelta]:
    deltas: list[TokenDelta] = []
    for _ in range(limit):
        if engine.idle:
            return deltas
        deltas += engine.step()
    raise AssertionError("the engine did not become idle")


def request(name: str, lark: str = "", max_tokens: int = 64, **fields: object) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **fields)  # type: ignore[arg-type]
    return Request(
        id=name, prompt_token_ids=(96,), sampling=sampling, eos_token_ids=(EOS,), grammar=lark and grammar(lark)
    )


def text(deltas: list[TokenDelta], name: str) -> bytes:
    return bytes(token for delta in deltas if delta.request_id == name for token in delta.token_ids if token < 256)


@pytest.mark.parametrize("dp_size", [1, 2])
def test_rows_with_and_without_grammars_run_together(tokenizer: GrammarTokenizer, dp_size: int) -> None:
    engine, _ = make_engine(max_rows=8, max_step_tokens=64, page_size=16, dp_size=dp_size, vocab_size=VOCAB_SIZE)
    engine.use_tokenizer(tokenizer)
    engine.add(request("free", max_tokens=6))
    engine.add(request("choice", 'start: "yes" | "no"'))
    engine.add(request("penalised", 'start: "yes" | "no"', presence_penalty=1.0))
    engine.add(request("pattern", "start: /[p-r]{3,5}/", max_tokens=4))
    engine.add(request("ends", "start: /[x-z]+/", ignore_eos=True, logit_bias={}))
    deltas = run(engine)
    ends = {delta.request_id: delta.finish_reason for delta in deltas if delta.finish_reason}
    # The fake model goes up the alphabet from its last token.
    assert text(deltas, "free") == b"abcdef"
    assert text(deltas, "choice") == text(deltas, "penalised") == b"no"
    assert text(deltas, "pattern") == b"pqr"
    assert text(deltas, "ends") == b"xyz"
    assert ends == {
        "free": FinishReason.LENGTH, "choice": FinishReason.STOP, "penalised": FinishReason.STOP,
        "pattern": FinishReason.STOP, "ends": FinishReason.STOP,
    }  # fmt: skip


def test_forced_tokens_are_run_but_not_drawn(tokenizer: GrammarTokenizer) -> None:
    lark = 'start: "a long beginning without a choice: " /[a-c]/ " and a long end of it all"'
    outputs = set()
    for fields in ({}, {"presence_penalty": 1.0}, {"num_logprobs": 2}):
        engine, runner = make_engine(max_rows=4, max_step_tokens=64, page_size=16, vocab_size=VOCAB_SIZE)
        engine.use_tokenizer(tokenizer)
        engine.add(request("a", lark, **fields))
        deltas = run(engine)
        outputs.add(text(deltas, "a"))
        if "presence_penalty" in fields:  # penalties count sampled tokens
            assert len(runner.plans) > 60
        else:
            assert len(runner.plans) < 6
        for delta in deltas:
            if "num_logprobs" in fields:
                assert len(delta.logprobs) == len(delta.token_ids)
        assert deltas[-1].finish_reason is FinishReason.STOP
    assert outputs == {b"a long beginning without a choice: a and a long end of it all"}


def test_forced_tokens_keep_to_max_tokens(tokenizer: GrammarTokenizer) -> None:
    engine, _ = make_engine(max_rows=4, max_step_tokens=64, page_size=16, vocab_size=VOCAB_SIZE)
    engine.use_tokenizer(tokenizer)
    engine.add(request("a", 'start: "abcdefgh"', max_tokens=3))
    engine.add(request("b", 'start: /[m-n]/ "abcdefgh"', max_tokens=3))
    deltas = run(engine)
    assert (text(deltas, "a"), text(deltas, "b")) == (b"abc", b"mab")
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.LENGTH] * 2


def test_a_row_that_nothing_may_follow(tokenizer: GrammarTokenizer) -> None:
    """Forbidden tokens and the grammar together can allow no token; the request then ends with an error."""
    engine, runner = make_engine(max_rows=4, max_step_tokens=64, page_size=16, vocab_size=VOCAB_SIZE)
    engine.use_tokenizer(tokenizer)
    runner.not_finite = {0}
    engine.add(request("a", "start: /[a-c]{9}/", logit_bias={97: -100.0}))
    [end] = run(engine)
    assert end.finish_reason is FinishReason.ERROR
    assert end.refused
    assert "allow no token" in (end.error or "")


def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone(tokenizer: GrammarTokenizer) -> None:
    engine, _ = make_engine(max_rows=4, max_step_tokens=64, page_size=16, vocab_size=VOCAB_SIZE)
    engine.use_tokenizer(tokenizer)
    engine.add(request("bad", "start: other"))
    engine.add(request("good", 'start: "x"'))
    engine.add(request("gone", 'start: "x"'))
    engine.abort("gone")
    assert engine.stats.num_waiting == 2
    assert not engine.flush_cache()
    ends = {delta.request_id: delta for delta in run(engine) if delta.finish_reason}
    assert ends["bad"].finish_reason is FinishReason.ERROR
    assert ends["bad"].refused
    assert ends["good"].finish_reason is FinishReason.STOP
    assert ends["gone"].finish_reason is FinishReason.ABORT
    assert engine.flush_cache()


def test_grammars_without_an_output_are_refused(tokenizer: GrammarTokenizer) -> None:
    loaded = load_tokenizer(tokenizer)
    for part in (
        {"json_schema": {"$ref": "#"}},
        {"json_schema": {"enum": []}},
        {"lark_grammar": "start: A\nA: /a/ & /b/"},
    ):
        with pytest.raises(GrammarError):
            compile_grammar(loaded, json.dumps({"grammars": [part]}))


def test_thinking_and_grammar_together(tokenizer: GrammarTokenizer, tmp_path: Path) -> None:
    """The budget closes the thinking with which a grammar begins."""
    engine, _ = make_engine(max_rows=4, max_step_tokens=64, page_size=16, vocab_size=VOCAB_SIZE)
    engine.use_tokenizer(tokenizer)
    lark = 'start: thinking "yes"\nthinking[suffix="</t>"]: /(.|\\n)*/'
    thinking = ThinkingBudget(start="<t>", end="</t>", in_reasoning=True, budget=4, end_token_ids=tuple(b"</t>"))
    both = request("a", lark)
    engine.add(
        Request(
            id="a", prompt_token_ids=(96,), sampling=both.sampling, eos_token_ids=(EOS,), grammar=both.grammar,
            thinking=thinking,
        )
    )  # fmt: skip
    assert text(run(engine), "a") == b"abcd</t>yes"
