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
from kernels_pallas.sampling.cases import Case, Sampler, check_output, large_case, sampling_case, step_cases
from kernels_pallas.sampling.common.summary import NUM_CANDIDATES, Shard, sampling_mode
from kernels_pallas.sampling.xla import backend as xla
from tests.support.kernels import interpreted, needs_pallas
from tests.support.marks import slow


def implementation(name: str, block: int = 4096, *, detect_races: bool = True) -> Sampler:
    return xla.sample if name == "xla" else interpreted(name, detect_races=detect_races).sampler(block)


@cache
def compiled(name: str, mode: SamplingMode) -> Sampler:
    """Return one jitted function for all cases of a mode, so that cases of one size share a program."""
    return jax.jit(partial(implementation(name), mode=mode))


def check(name: str, case: Case) -> None:
    """Check a step in the mode that suffices for its rows."""
    logits, (inputs, state) = jnp.asarray(case.logits()), case.arrays()
    mode = sampling_mode(jax.device_get(inputs), case.vocab_size)
    check_output(case, jax.device_get(compiled(name, mode)(logits, inputs, state)))


# The largest of these vocabularies fills several blocks, the smallest less than one.
ALL = [("xla", case) if case.vocab_size in (17, 5000) else slow("xla", case) for case in step_cases()] + [
    pytest.param(name, case, marks=[needs_pallas, *([] if case.vocab_size == 5000 else [pytest.mark.slow])])
    for name in ("tpu", "gpu")
    for case in step_cases()
    if case.vocab_size in (300, 5000)
]


@pytest.mark.parametrize(("name", "case"), ALL, ids=str)
def test_matches_numpy(name: str, case: Case) -> None:
    check(name, case)


@pytest.mark.parametrize("name", ["xla", slow("tpu"), slow("gpu")])
def test_matches_numpy_at_a_real_size(name: str) -> None:
    """Race detection in the TPU kernel, which would take a minute, is left to the smaller sizes."""
    case = large_case()
    sampler = implementation(name, block=32768, detect_races=name != "tpu")
    step = sampling_case(sampler, case, SamplingMode.ADJUSTED)
    step.verify(jax.jit(step.run)(*step.arguments))


@needs_pallas
@pytest.mark.parametrize("rows", [slow(1), 17])
def test_any_number_of_rows_in_a_group(rows: int) -> None:
    """The last group of 8 rows is not full."""
    whole = next(case for case in step_cases() if case.name == "filtered" and case.vocab_size == 1024)
    logits, (inputs, state) = whole.logits()[:rows], whole.arrays()
    out = jax.jit(implementation("tpu"))(jnp.asarray(logits), jax.tree.map(lambda x: x[:rows], inputs), state)
    check_output(Case(name="cut", vocab_size=1024, samples=whole.samples[:rows]), jax.device_get(out))


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
    check_output(case, out)


@pytest.mark.parametrize("case", [slow(step_cases()[-3]), step_cases()[-2]], ids=str)
# Both kernels' results are combined by the same code.
@pytest.mark.parametrize(
    "name", [pytest.param("tpu", marks=[needs_pallas, pytest.mark.slow]), pytest.param("gpu", marks=needs_pallas)]
)
def test_sharded_vocabulary_samples_same_tokens_in_kernels(name: str, case: Case) -> None:
    out = jax.device_get(sharded(name, case.vocab_size, 2)(*padded(case, 2)))
    check_output(case, out)


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
