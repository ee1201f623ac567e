"""Named sampling steps and their expected results from numpy; every implementation is tested on all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.kernel_case import KernelCase
from kernels_pallas.sampling.api import (
    NUM_TOP_LOGPROBS,
    SampleOutput,
    SamplingInputs,
    SamplingMode,
    SamplingState,
    mask_words,
)
from kernels_pallas.sampling.common.summary import Shard, sampling_mode
from kernels_pallas.sampling.reference import RowParams, adjusted_logits, sample_reference

# (logits_BV, inputs, state, shard, mode) -> output
Sampler = Callable[..., SampleOutput]

_LOGPROB_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of a step: its parameters and its logits.

    Attributes:
        scale: standard deviation of the logits.
        step: logits are rounded to multiples of it, so that many are equal; 0 for no rounding.
        put: logits that are set by token id, such as NaN.
        target: token to score instead of sampling one, or -1.
        finite: expected `finite_B` of the row.
    """

    name: str
    params: RowParams
    scale: float = 3.0
    step: float = 0.0
    put: dict[int, float] = field(default_factory=dict)
    target: int = -1
    logprobs: bool = False
    finite: bool = True


@dataclass(frozen=True, kw_only=True)
class Case:
    """A sampling step: rows with one vocabulary size."""

    name: str
    vocab_size: int
    samples: tuple[Sample, ...]

    def __str__(self) -> str:
        return f"{self.name}-{self.vocab_size}"

    def logits(self) -> np.ndarray:
        """Return random logits, f32[B, V]."""
        rng = np.random.default_rng(self.vocab_size)
        out = np.zeros((len(self.samples), self.vocab_size), np.float32)
        for row, sample in enumerate(self.samples):
            out[row] = rng.standard_normal(self.vocab_size) * sample.scale
            if sample.step:
                out[row] = np.round(out[row] / sample.step) * sample.step
            for token, value in sample.put.items():
                out[row, token] = value
        return out

    def arrays(self, *, padded_to: int | None = None) -> tuple[SamplingInputs, SamplingState]:
        """Return the device arrays; the last state row is spare, and state rows are in reverse order of the samples.

        Args:
            padded_to: number of ids in `counts_RV`, if the vocabulary is not a multiple of the number of shards.
        """
        return _arrays(self, padded_to or self.vocab_size)


def _arrays(case: Case, width: int) -> tuple[SamplingInputs, SamplingState]:
    size, samples = case.vocab_size, case.samples
    params = [sample.params for sample in samples]
    row_B: Any = np.arange(len(samples), dtype=np.int32)[::-1].copy()
    rows = len(samples) + 1
    # Counts of padding ids and of rows without penalties must not matter, so they are not zero.
    state_arrays: list[Any] = [
        np.full((rows, width), 7, np.int32),
        np.full((rows, 16), size, np.int32),
        np.zeros((rows, 16), np.float32),
        np.full((rows, 8), size, np.int32),
    ]
    state = SamplingState(*state_arrays)
    for row, p in zip(row_B, params, strict=True):
        if p.counts is not None:
            state_arrays[0][row, :size] = 0
        for token, count in (p.counts or {}).items():
            state_arrays[0][row, token] = count
        for index, (token, bias) in enumerate((p.bias or {}).items()):
            state_arrays[1][row, index], state_arrays[2][row, index] = token, bias
        state_arrays[3][row, : len(p.forbidden)] = p.forbidden
    mask_BW: Any = np.zeros((len(samples), mask_words(size)), np.int32)
    for row, p in enumerate(params):
        for token in p.allowed or ():
            mask_BW.view(np.uint32)[row, token // 32] |= np.uint32(1 << token % 32)

    def array(values: list[Any], dtype: type) -> Any:
        return np.array(values, dtype)

    def column(name: str, dtype: type) -> Any:
        return array([getattr(p, name) for p in params], dtype)

    inputs = SamplingInputs(
        row_B=row_B,
        target_B=array([sample.target for sample in samples], np.int32),
        position_B=column("position", np.int32),
        seed_B2=array([[p.seed & 0xFFFFFFFF, p.seed >> 32] for p in params], np.uint32),
        temperature_B=column("temperature", np.float32),
        top_k_B=array([p.top_k if p.top_k > 0 else size for p in params], np.int32),
        top_p_B=column("top_p", np.float32),
        min_p_B=column("min_p", np.float32),
        frequency_B=column("frequency", np.float32),
        presence_B=column("presence", np.float32),
        repetition_B=column("repetition", np.float32),
        biased_B=array([bool(p.bias) for p in params], bool),
        forbid_stops_B=array([bool(p.forbidden) for p in params], bool),
        logprobs_B=array([sample.logprobs for sample in samples], bool),
        masked_B=array([p.allowed is not None for p in params], bool),
        mask_BW=mask_BW,
    )
    return jax.tree.map(jnp.asarray, inputs), jax.tree.map(jnp.asarray, state)


@dataclass(frozen=True)
class Expected:
    """Expected result of a row."""

    token: int
    logprob: float
    top_ids: np.ndarray
    top_logprobs: np.ndarray


def expected(sample: Sample, logits_V: np.ndarray) -> Expected:
    """Compute the expected result of a finite row with numpy."""
    adjusted_V = adjusted_logits(logits_V, sample.params)
    logprobs_V = adjusted_V - np.logaddexp.reduce(adjusted_V)
    token = sample.target if sample.target >= 0 else sample_reference(logits_V, sample.params)[0]
    top_ids = np.argsort(-adjusted_V, kind="stable")[:NUM_TOP_LOGPROBS]
    return Expected(token, logprobs_V[token], top_ids, logprobs_V[top_ids])


def sampling_case(sample: Sampler, case: Case, mode: SamplingMode | None = None) -> KernelCase:
    """Return a step of a sampler, in a mode or in the one that suffices for its rows."""
    inputs, state = case.arrays()
    if mode is None:
        mode = sampling_mode(jax.device_get(inputs), case.vocab_size)
    shard = Shard(case.vocab_size)

    def run(logits_BV: jax.Array, inputs: SamplingInputs, state: SamplingState) -> SampleOutput:
        return sample(logits_BV, inputs, state, shard, mode)

    arguments = (jnp.asarray(case.logits()), inputs, state)
    return KernelCase(run=run, arguments=arguments, verify=lambda out: check_output(case, jax.device_get(out)))


def check_output(case: Case, out: SampleOutput) -> None:
    """Raise AssertionError with the rows whose results are not those of the reference."""
    wrong: list[str] = []
    for row, (sample, logits_V) in enumerate(zip(case.samples, case.logits(), strict=True)):
        if bool(out.finite_B[row]) != sample.finite:
            wrong.append(f"{sample.name}: finite {bool(out.finite_B[row])}")
        if not sample.finite:
            continue
        want = expected(sample, logits_V)
        if int(out.token_B[row]) != want.token:
            wrong.append(f"{sample.name}: token {int(out.token_B[row])}, not {want.token}")
        if not sample.logprobs:
            continue
        if abs(float(out.logprob_B[row]) - want.logprob) > _LOGPROB_TOLERANCE:
            wrong.append(f"{sample.name}: log-probability {float(out.logprob_B[row])}, not {want.logprob}")
        # The order of tokens with zero probability is arbitrary.
        some = np.flatnonzero(want.top_logprobs > -np.inf)
        top_ids, top_logprobs = out.top_ids_BJ[row], out.top_logprobs_BJ[row]
        if top_ids[some].tolist() != want.top_ids[some].tolist():
            wrong.append(f"{sample.name}: top ids {top_ids[some].tolist()}, not {want.top_ids[some].tolist()}")
        if not np.allclose(top_logprobs[some], want.top_logprobs[some], atol=_LOGPROB_TOLERANCE):
            wrong.append(f"{sample.name}: top log-probabilities")
        if not (top_logprobs[len(some) :] == -np.inf).all():
            wrong.append(f"{sample.name}: top log-probabilities past the last")
    assert not wrong, "\n".join(wrong)


def step_cases(sizes: tuple[int, ...] = (17, 300, 1024, 5000)) -> list[Case]:
    """Return every kind of step at every vocabulary size; the row counts are equal, so one program serves a size."""
    cases: list[Case] = []
    for size in sizes:
        cases += [_plain(size), _filtered(size), _adjusted(size)]
    cases.append(_collisions(max(5000, *sizes)))
    rows = max(len(case.samples) for case in cases)
    return [replace(case, samples=tuple(islice(cycle(case.samples), rows))) for case in cases]


def large_case() -> Case:
    """Return one step of the largest vocabulary; candidates decide all of its filters but one."""
    samples = (
        Sample(name="top-k", params=RowParams(seed=1, top_k=20, top_p=0.95)),
        Sample(name="wide top-p", params=RowParams(seed=2, top_p=0.9), scale=1.0, logprobs=True),
        Sample(name="penalties", params=RowParams(seed=3, top_k=50, presence=1.5, counts={5: 1, 262143: 2})),
    )
    return Case(name="large", vocab_size=262144, samples=samples)


def _plain(size: int) -> Case:
    """Rows decided by an argmax alone: greedy, or sampled from the whole vocabulary."""
    samples = (
        Sample(name="greedy", params=RowParams(temperature=0)),
        Sample(name="greedy ties", params=RowParams(temperature=0), step=4.0),
        Sample(name="all equal", params=RowParams(temperature=0), scale=0.0),
        Sample(name="top-k 1", params=RowParams(top_k=1)),
        Sample(name="temperature", params=RowParams(seed=2**63 + 5, position=3, temperature=0.7)),
        Sample(name="hot", params=RowParams(seed=6, temperature=1.9)),
        Sample(name="one is allowed", params=RowParams(seed=9), put={i: -np.inf for i in range(size) if i != size - 1}),
        Sample(name="nan", params=RowParams(), put={size // 2: np.nan}, finite=False),
        Sample(name="inf", params=RowParams(temperature=0), put={size - 1: np.inf}, finite=False),
        Sample(name="none", params=RowParams(), put=dict.fromkeys(range(size), -np.inf), finite=False),
    )
    return Case(name="plain", vocab_size=size, samples=samples)


def _filtered(size: int) -> Case:
    """Top-k, top-p, min-p and log-probabilities of unadjusted logits."""
    samples = (
        Sample(name="top-k", params=RowParams(seed=1, top_k=5)),
        Sample(name="top-k beyond candidates", params=RowParams(seed=2, top_k=max(2, size // 3)), scale=0.5),
        Sample(name="top-p", params=RowParams(seed=3, top_p=0.8)),
        Sample(name="top-p beyond candidates", params=RowParams(seed=4, top_p=0.97), scale=0.1),
        Sample(name="min-p", params=RowParams(seed=5, min_p=0.05)),
        Sample(name="min-p beyond candidates", params=RowParams(seed=6, min_p=0.5), scale=0.05),
        Sample(name="all", params=RowParams(seed=7, top_k=20, top_p=0.95, min_p=0.01, temperature=0.8)),
        Sample(name="top-k cuts ties", params=RowParams(seed=8, top_k=3), step=2.0),
        Sample(name="top-p cuts ties", params=RowParams(seed=9, top_p=0.5037), step=4.0, logprobs=True),
        Sample(name="top-k of equal logits", params=RowParams(seed=10, top_k=max(2, size // 2 + 1)), scale=0.0),
        Sample(name="top-k counts no zero twice", params=RowParams(seed=12, top_k=2), put={0: 30.0, 1: 0.0, 2: -0.0}),
        Sample(name="logprobs", params=RowParams(temperature=0), logprobs=True),
        Sample(name="logprobs of a draw", params=RowParams(seed=11, temperature=1.3), logprobs=True),
        Sample(name="logprobs of ties", params=RowParams(temperature=0), step=6.0, logprobs=True),
        Sample(name="target", params=RowParams(), target=size - 2, logprobs=True),
        Sample(name="plain among them", params=RowParams(seed=13)),
        Sample(name="nan", params=RowParams(top_p=0.5), put={3: np.nan}, finite=False),
        Sample(name="inf", params=RowParams(top_k=4), put={3: np.inf}, finite=False, logprobs=True),
    )
    return Case(name="filtered", vocab_size=size, samples=samples)


def _adjusted(size: int) -> Case:
    """Penalties, mask, bias and forbidden tokens, alone and together."""
    counts = {0: 2, 3: 1, size // 2: 5, size - 1: 1}
    allowed_ids = tuple(range(2, size, max(1, size // 3)))
    penalties: dict[str, Any] = {"repetition": 1.3, "frequency": 0.4, "presence": 0.6, "counts": counts}
    everything: dict[str, Any] = {**penalties, "bias": {1: 3.0, size - 1: 2.0}, "forbidden": (size - 3, 2)}
    allowed = tuple(range(1, size, 3))
    samples = (
        Sample(name="repetition", params=RowParams(seed=1, repetition=1.7, counts=counts)),
        Sample(name="frequency", params=RowParams(temperature=0, frequency=2.0, counts=counts)),
        Sample(name="presence", params=RowParams(seed=3, presence=-2.0, counts=counts, top_k=4)),
        Sample(name="penalties", params=RowParams(seed=4, top_p=0.9, **penalties), logprobs=True),
        Sample(name="bias", params=RowParams(seed=5, bias={4: 6.0, size - 1: 5.0, 0: -3.0})),
        Sample(name="bias forbids", params=RowParams(temperature=0, bias=dict.fromkeys(range(3, 17), -np.inf))),
        Sample(name="mask", params=RowParams(seed=7, allowed=allowed)),
        Sample(name="mask with few", params=RowParams(seed=8, allowed=allowed_ids, top_p=0.99), logprobs=True),
        Sample(name="mask with one", params=RowParams(seed=9, allowed=(size - 1,), top_k=3), logprobs=True),
        Sample(
            name="mask and bias",
            params=RowParams(temperature=0, allowed=allowed_ids, bias={allowed_ids[-1]: 40.0, 0: 90.0}),
        ),
        Sample(
            name="forbidden", params=RowParams(temperature=0, forbidden=(5, size - 1)), put={5: 40.0, size - 1: 50.0}
        ),
        Sample(name="everything", params=RowParams(seed=12, top_k=9, allowed=allowed, **everything), logprobs=True),
        Sample(name="target", params=RowParams(temperature=1.5, **everything), target=size - 1, logprobs=True),
        Sample(name="flat and adjusted", params=RowParams(seed=14, top_p=0.9, **everything), scale=0.05),
        Sample(name="greedy among them", params=RowParams(temperature=0)),
        Sample(name="mask with none", params=RowParams(allowed=()), finite=False),
        Sample(name="all forbidden", params=RowParams(allowed=(1, 2), forbidden=(1, 2), top_k=2), finite=False),
        Sample(name="nan", params=RowParams(allowed=allowed, min_p=0.1), put={1: np.nan}, finite=False),
    )
    return Case(name="adjusted", vocab_size=size, samples=samples)


def _collisions(size: int) -> Case:
    """Rows with more likely tokens in one bucket (ids equal modulo 1024) than a bucket lists."""
    ids = range(7, size, 1024)
    biased = dict.fromkeys(ids, 20.0)
    samples = (
        Sample(name="bias", params=RowParams(seed=1, top_k=5, bias=biased), scale=0.5, logprobs=True),
        Sample(name="bias and top-p", params=RowParams(seed=2, top_p=0.999, bias=biased), scale=0.5),
        Sample(name="logits", params=RowParams(seed=3, top_k=len(ids)), put=dict.fromkeys(ids, 25.0)),
        Sample(name="logprobs", params=RowParams(temperature=0), put=dict.fromkeys(ids, 25.0), logprobs=True),
    )
    return Case(name="collisions", vocab_size=size, samples=samples)
