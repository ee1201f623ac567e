"""Every sampling backend against numpy, token for token, with whole vocabularies and with split ones."""

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.sampling.api import SampleOutput, SamplingInputs, SamplingMode, SamplingState
from kernels_pallas.sampling.cases import Case, expected, large_case, step_cases
from kernels_pallas.sampling.common.summary import NUM_CANDIDATES, Shard, sampling_mode
from kernels_pallas.sampling.xla import backend as xla
from tests.support.marks import slow

Sample = Callable[..., SampleOutput]


def implementation(name: str, block: int = 4096, *, detect_races: bool = True) -> Sample:
    """Return a sampler; the TPU and GPU kernels run interpreted on the CPU."""
    if name == "xla":
        return xla.sample
    if name == "tpu":
        from jax.experimental.pallas import tpu as pltpu

        from kernels_pallas.sampling.tpu import backend as tpu

        params: Any = pltpu.InterpretParams(
            detect_races=detect_races, out_of_bounds_reads="raise", uninitialized_memory="nan"
        )
        return partial(tpu.sample, block=block, interpret=params)
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels_pallas.sampling.gpu import backend as gpu

    return partial(gpu.sample, interpret=plgpu.InterpretGPUParams(detect_races=detect_races))


@cache
def compiled(name: str, mode: SamplingMode) -> Sample:
    """Return one jitted function for all cases of a mode, so that cases of one size share a program."""
    return jax.jit(partial(implementation(name), mode=mode))


def sample(name: str, logits: Any, inputs: SamplingInputs, state: SamplingState) -> SampleOutput:
    """Sample as a step does, in the mode that suffices for its rows."""
    mode = sampling_mode(jax.device_get(inputs), logits.shape[1])
    return jax.device_get(compiled(name, mode)(jnp.asarray(logits), inputs, state))


needs_pallas = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
KERNELS = [pytest.param(name, marks=needs_pallas) for name in ("tpu", "gpu")]


def check(case: Case, out: SampleOutput) -> None:
    logits = case.logits()
    wrong: list[str] = []
    for row, sample in enumerate(case.samples):
        if bool(out.finite_B[row]) != sample.finite:
            wrong.append(f"{sample.name}: finite {bool(out.finite_B[row])}")
        if not sample.finite:
            continue
        want = expected(sample, logits[row])
        if int(out.token_B[row]) != want.token:
            wrong.append(f"{sample.name}: token {int(out.token_B[row])}, not {want.token}")
        if not sample.logprobs:
            continue
        if abs(float(out.logprob_B[row]) - want.logprob) > 1e-4:
            wrong.append(f"{sample.name}: logprob {float(out.logprob_B[row])}, not {want.logprob}")
        # The order of tokens with zero probability is arbitrary.
        some = np.flatnonzero(want.top_logprobs > -np.inf)
        if out.top_ids_BJ[row][some].tolist() != want.top_ids[some].tolist():
            wrong.append(
                f"{sample.name}: top ids {out.top_ids_BJ[row][some].tolist()}, not {want.top_ids[some].tolist()}"
            )
        if not np.allclose(out.top_logprobs_BJ[row][some], want.top_logprobs[some], atol=1e-4):
            wrong.append(f"{sample.name}: top logprobs")
        if len(some) < len(out.top_logprobs_BJ[row]) and not (out.top_logprobs_BJ[row][len(some) :] == -np.inf).all():
            wrong.append(f"{sample.name}: top logprobs past the last")
    assert not wrong, "\n".join(wrong)


# The largest of these vocabularies fills several blocks, the smallest less than one.
ALL = [("xla", case) if case.vocab_size in (17, 5000) else slow("xla", case) for case in step_cases()] + [
    pytest.param(name, case, marks=[needs_pallas, *([] if case.vocab_size == 5000 else [pytest.mark.slow])])
    for name in ("tpu", "gpu")
    for case in step_cases()
    if case.vocab_size in (300, 5000)
]


@pytest.mark.parametrize(("name", "case"), ALL, ids=str)
def test_matches_numpy(name: str, case: Case) -> None:
    check(case, sample(name, case.logits(), *case.arrays()))


@pytest.mark.parametrize("name", ["xla", slow("tpu"), slow("gpu")])
def test_matches_numpy_at_a_real_size(name: str) -> None:
    """Race detection in the TPU kernel, which would take a minute, is left to the smaller sizes."""
    case = large_case()
    out = jax.jit(implementation(name, block=32768, detect_races=name != "tpu"))(
        jnp.asarray(case.logits()), *case.arrays()
    )
    check(case, jax.device_get(out))


@needs_pallas
@pytest.mark.parametrize("rows", [slow(1), 17])
def test_any_number_of_rows_in_a_group(rows: int) -> None:
    """The last group of 8 rows is not full."""
    whole = next(case for case in step_cases() if case.name == "filtered" and case.vocab_size == 1024)
    logits, (inputs, state) = whole.logits()[:rows], whole.arrays()
    out = jax.jit(implementation("tpu"))(jnp.asarray(logits), jax.tree.map(lambda x: x[:rows], inputs), state)
    check(Case(name="cut", vocab_size=1024, samples=whole.samples[:rows]), jax.device_get(out))


@cache
def sharded(name: str, vocab_size: int, shards: int) -> Callable[..., SampleOutput]:
    sample = implementation(name)
    mesh = Mesh(np.array(jax.devices()[:shards]), ("model",))
    shard = Shard(vocab_size, "model")
    return jax.jit(
        jax.shard_map(
            lambda logits, inputs, state: sample(logits, inputs, state, shard),
            mesh=mesh,
            in_specs=(P(None, "model"), P(), SamplingState(P(None, "model"), P(), P(), P())),
            out_specs=P(),
            check_vma=False,
        )
    )


def padded(case: Case, shards: int) -> tuple[jax.Array, SamplingInputs, SamplingState]:
    """Return a case padded to a multiple of the shards; ids past the vocabulary have logits that would win."""
    width = -(-case.vocab_size // shards) * shards
    logits = np.pad(case.logits(), ((0, 0), (0, width - case.vocab_size)), constant_values=99.0)
    return jnp.asarray(logits), *case.arrays(padded_to=width)


SPLIT = [
    (shards, case) if (shards, case.vocab_size) in ((8, 17), (2, 5000)) else slow(shards, case)
    for shards in (2, 8)
    for case in step_cases()
]


@pytest.mark.parametrize(("shards", "case"), SPLIT, ids=str)
def test_sharded_vocabulary_samples_same_tokens(shards: int, case: Case) -> None:
    out = jax.device_get(sharded("xla", case.vocab_size, shards)(*padded(case, shards)))
    check(case, out)


@pytest.mark.parametrize("case", [slow(step_cases()[-3]), step_cases()[-2]], ids=str)
# Both kernels' results are combined by the same code.
@pytest.mark.parametrize(
    "name", [pytest.param("tpu", marks=[needs_pallas, pytest.mark.slow]), pytest.param("gpu", marks=needs_pallas)]
)
def test_sharded_vocabulary_samples_same_tokens_in_kernels(name: str, case: Case) -> None:
    out = jax.device_get(sharded(name, case.vocab_size, 2)(*padded(case, 2)))
    check(case, out)


COLLECTIVE = re.compile(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def collectives(text: str) -> list[int]:
    """Return the number of elements that each collective of a program returns on one device."""
    sizes: list[int] = []
    for line in COLLECTIVE.findall(text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", line)
        sizes += [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
    return sizes


@pytest.mark.parametrize("shards", [slow(2), 8])
def test_only_candidates_cross_the_mesh(shards: int) -> None:
    rows, vocab_size = 4, 64_000
    case: Any = Case(name="", vocab_size=vocab_size, samples=step_cases()[1].samples[:rows])
    compiled = sharded("xla", vocab_size, shards).lower(*padded(case, shards)).compile()
    sizes = collectives(compiled.as_text())
    assert len(sizes) >= 3
    assert max(sizes) <= rows * shards * (2 * NUM_CANDIDATES + 8)
    assert max(sizes) < rows * vocab_size // shards
