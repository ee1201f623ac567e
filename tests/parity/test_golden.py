"""Logits equal those of transformers for every architecture and rope variant.

Prompts run whole, in chunks, token by token, in batches, and sharded.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.builder import build_runner
from jaxserve.layers.context import NoLora
from jaxserve.layers.mla_prefill import MlaPrefillWorkspace, PrefillCosts
from jaxserve.runner.batch import ForwardBatch
from jaxserve.runner.buckets import Bucket, ForwardShape
from jaxserve.runner.programs import StepModel
from jaxserve.runner.runner import ModelRunner
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import NewRow, ScheduledRow, SchedulerOutput
from tests.support.marks import slow

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir())
# Models that are split in ways that the others do not cover.
SPLIT = ("llama_wide_heads", "phi3", "qwen2_moe", "gpt_oss", "deepseek_v3", "deepseek_v3_fp8", "qwen3_fp8", "olmo2")
# 60 tokens through two layers of width 32 in f32; logits of magnitude ~10.
TOLERANCE = 1e-4


class Model(NamedTuple):
    """A runner and its golden logits; `run` calls the forward pass directly, to get the logits of every token."""

    runner: ModelRunner
    token_ids: np.ndarray
    logits: np.ndarray
    mha_prefill: bool = False


def load(name: str, **changes: object) -> Model:
    sizes: dict[str, Any] = {"max_running_requests": 4, "chunked_prefill_size": 128, **changes}
    config = EngineConfig(
        model_path=str(GOLDEN / name), page_size=8, max_total_tokens=512, show_progress=False, **sizes
    )
    golden = np.load(GOLDEN / name / "golden.npz")
    return Model(build_runner(config, lambda items, *_: items).runner, golden["token_ids"], golden["logits"])


@partial(jax.jit, static_argnums=(0, 1))
def forward(
    model: StepModel, mha_prefill: bool, weights: object, cache: object, batch: ForwardBatch
) -> tuple[jax.Array, object]:
    ops = model.ops(mha_prefill=mha_prefill)
    x_TD, cache = model.decoder.forward(weights, cache, *batch.tokens_4T[:2], batch.attention_meta(), ops, NoLora())
    return model.decoder.logits(weights, x_TD, NoLora()), cache


def run(model: Model, rows: list[ScheduledRow]) -> np.ndarray:
    """Return the logits of every token of a step."""
    runner = model.runner
    plan = SchedulerOutput(step=0, new_rows=(), rows=tuple(rows))
    batch = jax.tree.map(jnp.asarray, runner._rows[0].build(plan, Bucket(128, 4)))
    logits, runner._cache = forward(runner._model, model.mha_prefill, runner._weights, runner._cache, batch)
    return np.asarray(logits[: plan.num_tokens])


def row(index: int, token_ids: np.ndarray, start: int, end: int, pages: int = 8) -> ScheduledRow:
    return ScheduledRow(
        row=index,
        token_ids=tuple(token_ids[start:end].tolist()),
        num_computed_tokens=start,
        new_page_ids=tuple(range(index * pages, (index + 1) * pages)) if start == 0 else (),
        samples=False,
    )


def close(got: np.ndarray, want: np.ndarray) -> None:
    error = np.abs(got - want)
    assert error.max() <= TOLERANCE, f"max error {error.max():.2e} at {np.unravel_index(error.argmax(), error.shape)}"


@pytest.mark.parametrize("name", NAMES)
def test_whole_prompts_in_one_batch_then_chunks_and_single_tokens(name: str) -> None:
    model = load(name)
    logits = run(model, [row(i, ids, 0, 60) for i, ids in enumerate(model.token_ids)])
    close(logits.reshape(model.logits.shape), model.logits)
    ids, want = model.token_ids[0], model.logits[0]
    got = [run(model, [row(0, ids, start, end)]) for start, end in ((0, 7), (7, 33), (33, 50))]
    got += [run(model, [row(0, ids, position, position + 1)]) for position in range(50, 60)]
    close(np.concatenate(got), want)


@pytest.mark.parametrize("name", [slow("llama"), "mistral", slow("qwen3")])
def test_decode_beside_prefill(name: str) -> None:
    model = load(name)
    run(model, [row(0, model.token_ids[0], 0, 59)])
    logits = run(model, [row(0, model.token_ids[0], 59, 60), row(1, model.token_ids[1], 0, 60)])
    close(logits[0], model.logits[0, 59])
    close(logits[1:], model.logits[1])


@pytest.mark.parametrize(
    ("name", "tp_size"),
    [
        *(((name, 4) if name in SPLIT else slow(name, 4)) for name in NAMES),
        ("qwen3", 2),
        *(slow(name, 2) for name in ("qwen2_moe", "gpt_oss")),
    ],
)
def test_sharded(name: str, tp_size: int) -> None:
    """With four devices and two KV heads, each head is replicated, as is the single KV head of latent attention."""
    model = load(name, tp_size=tp_size)
    logits = run(model, [row(i, ids, 0, 60) for i, ids in enumerate(model.token_ids)])
    close(logits.reshape(model.logits.shape), model.logits)


@pytest.mark.parametrize(
    ("name", "tp_size", "ep_size"),
    [
        ("qwen3_moe", 8, 2),
        *(slow("qwen3_moe", 8, ep_size) for ep_size in (1, 4, 8)),
        slow("gpt_oss", 4, 2),
        ("deepseek_v3_fp8", 4, 2),
    ],
)
def test_experts_on_devices_of_their_own(name: str, tp_size: int, ep_size: int) -> None:
    model = load(name, tp_size=tp_size, ep_size=ep_size)
    logits = run(model, [row(i, ids, 0, 60) for i, ids in enumerate(model.token_ids)])
    close(logits.reshape(model.logits.shape), model.logits)


@pytest.mark.parametrize(
    ("dtype", "name", "sizes"),
    [
        ("fp8_e4m3", "qwen3", {}),
        ("int8", "qwen2_windows", {"tp_size": 4}),
        slow("int8", "gpt_oss", {"deterministic": True}),
        ("fp8_e4m3", "deepseek_v3", {"tp_size": 2}),
        slow("int8", "qwen3", {}),
        slow("fp8_e4m3", "qwen2_windows", {"tp_size": 4}),
        slow("fp8_e4m3", "gpt_oss", {"deterministic": True}),
        slow("int8", "deepseek_v3", {"tp_size": 2}),
    ],
)
def test_a_cache_of_8_bits(dtype: str, name: str, sizes: dict[str, int]) -> None:
    """Rounding keys and values changes the logits by less than a quarter of their standard deviation."""
    model = load(name, kv_cache_dtype=dtype, **sizes)
    assert {array.dtype.itemsize for array in model.runner._cache.values()} == {1}
    ids, want = model.token_ids[0], model.logits[0]
    parts = [run(model, [row(0, ids, start, end)]) for start, end in ((0, 33), (33, 59), (59, 60))]
    error = np.concatenate(parts) - want
    assert np.sqrt(np.mean(error**2)) < 0.25 * want.std()


LATENT = [name for name in NAMES if name.startswith("deepseek")]


@pytest.fixture
def _mha_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make prompts take the MHA form, although models as small as these gain nothing by it."""
    monkeypatch.setattr(MlaPrefillWorkspace, "costs", lambda _, rows: PrefillCosts(absorbed=len(list(rows)), mha=0))


def load_mha_prefill(name: str, **changes: object) -> Model:
    """Load a model for steps in which all prompts take the MHA form."""
    model = load(name, **changes)
    assert model.runner._model.mla_workspace is not None
    return model._replace(mha_prefill=True)


@pytest.mark.usefixtures("_mha_prefill")
@pytest.mark.parametrize(
    ("name", "tp_size"),
    [
        *(slow(name, 1) for name in LATENT),
        ("deepseek_v3", 4),
    ],
)
def test_mha_prefill(name: str, tp_size: int) -> None:
    """Prompts run whole, in chunks, and next to a row that runs a single token."""
    model = load_mha_prefill(name, tp_size=tp_size)
    logits = run(model, [row(i, ids, 0, 60) for i, ids in enumerate(model.token_ids)])
    close(logits.reshape(model.logits.shape), model.logits)
    one, two = model.token_ids[:2]
    got = [run(model, [row(2, two, start, end)]) for start, end in ((0, 7), (7, 33), (33, 59))]
    close(np.concatenate(got), model.logits[1, :59])
    logits = run(model, [row(2, two, 59, 60), row(3, one, 0, 60)])
    close(logits[0], model.logits[1, 59])
    close(logits[1:], model.logits[0])


@pytest.mark.usefixtures("_mha_prefill")
@pytest.mark.parametrize("dtype", [slow("fp8_e4m3"), "int8"])
def test_mha_prefill_of_a_cache_of_8_bits(dtype: str) -> None:
    model = load_mha_prefill("deepseek_v3", kv_cache_dtype=dtype, tp_size=2)
    parts = [run(model, [row(0, model.token_ids[0], start, end)]) for start, end in ((0, 33), (33, 59))]
    want = model.logits[0, :59]
    assert np.sqrt(np.mean((np.concatenate(parts) - want) ** 2)) < 0.25 * want.std()


# As few programs as can run two prompts.
FEW_PROGRAMS = {"max_running_requests": 2, "chunked_prefill_size": 64}


def sampled(*rows: ScheduledRow) -> SchedulerOutput:
    new_rows = tuple(NewRow(row=row.row, sampling=SamplingParams(temperature=0), seed=0) for row in rows)
    return SchedulerOutput(
        step=0, new_rows=new_rows, rows=tuple(msgspec.structs.replace(row, samples=True) for row in rows)
    )


def warm_runner(**changes: int) -> tuple[ModelRunner, list[SchedulerOutput]]:
    """Return a runner that is compiled and warmed up, and two steps for it."""
    model = load("qwen3", **FEW_PROGRAMS, **changes)
    model.runner.compile(lambda buckets: buckets)
    model.runner.warm_up()
    one, two = model.token_ids[:2]
    return model.runner, [sampled(row(0, one, 0, 60)), sampled(row(0, two, 0, 20), row(1, two, 0, 21))]


@pytest.fixture(scope="module")
def sampled_alone() -> list[list[int]]:
    runner, plans = warm_runner()
    outputs = [runner.forward((plan,)).sample((None,)).result()[0] for plan in plans]
    return [output.token_ids_B.tolist() for output in outputs if output is not None]


def test_warming_up_runs_attention_and_cache_writes() -> None:
    """A program that runs on padding only would write no page."""
    runner, _ = warm_runner()
    for name, pages in runner._cache.items():
        written = np.asarray(pages).astype(np.float32).any(axis=(1, 2, 3))
        assert written.reshape(-1, runner._model.layout.num_pages)[:, :2].all(), name


@pytest.mark.parametrize("tp_size", [slow(1), 2])
def test_dp_replicas_match_single_replica(sampled_alone: list[list[int]], tp_size: int) -> None:
    """Two replicas of the model run different steps in one program; their tokens are those of one replica."""
    runner, plans = warm_runner(tp_size=tp_size, dp_size=2)
    outputs = runner.forward(tuple(plans)).sample((None, None)).result()
    assert [output and output.token_ids_B.tolist() for output in outputs] == sampled_alone
    idle, other = runner.forward((None, plans[1])).sample((None, None)).result()
    assert idle is None
    assert other is not None
    assert other.token_ids_B.tolist() == sampled_alone[1]


@pytest.mark.parametrize(
    ("name", "tp_size", "dp_size", "ep_size"),
    [slow("qwen3_moe", 1, 4, 1), slow("deepseek_v3_fp8", 1, 2, 1), ("gpt_oss", 2, 2, 2)],
)
def test_dp_attention_matches_single_replica(name: str, tp_size: int, dp_size: int, ep_size: int) -> None:
    """Each replica has its own prompts, and the last one has none."""
    sizes = {"tp_size": tp_size, "dp_size": dp_size, "ep_size": ep_size}
    model = load(name, **FEW_PROGRAMS, **sizes, dp_attention=True)
    model.runner.compile(lambda buckets: buckets)
    model.runner.warm_up()
    ends = (60, 20, 33)[: dp_size - 1]
    plans = [sampled(row(0, model.token_ids[copy % 2], 0, end)) for copy, end in enumerate(ends)]
    logits = np.asarray(model.runner.forward((*plans, None))._logits).reshape(dp_size, -1, model.logits.shape[-1])
    for copy, end in enumerate(ends):
        close(logits[copy, 0], model.logits[copy % 2, end - 1])


@pytest.mark.usefixtures("_mha_prefill")
def test_runner_chooses_mha_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes the MHA form if any replica runs a prompt, even if another one only decodes; decode steps do not."""
    model = load("deepseek_v3", **FEW_PROGRAMS, dp_size=2, dp_attention=True)
    runner, shapes = model.runner, []

    def compiled(shape: ForwardShape) -> Any:
        shapes.append(shape)
        return runner._lowering.lower_forward(shape).compile()

    monkeypatch.setattr(runner._programs, "forward", compiled)
    one, two = model.token_ids[:2]
    steps = [(sampled(row(0, one, 0, 59)), None), (sampled(row(0, one, 59, 60)), sampled(row(0, two, 0, 40)))]
    steps.append((None, sampled(row(0, two, 40, 41))))
    logits = [np.asarray(runner.forward(step)._logits).reshape(2, -1, model.logits.shape[-1]) for step in steps]
    assert [shape.mha_prefill for shape in shapes] == [True, True, False]
    close(logits[0][0, 0], model.logits[0, 58])
    close(logits[1][:, 0], model.logits[[0, 1], [59, 39]])
    close(logits[2][1, 0], model.logits[1, 40])


@pytest.mark.parametrize("name", [slow("llama"), "qwen3"])
def test_deterministic_mode_gives_the_same_numbers(name: str) -> None:
    model = load(name, deterministic=True)
    logits = run(model, [row(i, ids, 0, 60) for i, ids in enumerate(model.token_ids)])
    close(logits.reshape(model.logits.shape), model.logits)
