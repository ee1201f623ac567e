"""The XLA sampler against numpy, token for token, and its noise against known answers and the Gumbel distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.sampling.api import NUM_TOP_LOGPROBS, SamplingInputs, SamplingState, mask_words
from kernels_pallas.sampling.common.random import gumbel_noise, threefry2x32
from kernels_pallas.sampling.reference import (
    RowParams,
    adjusted_logits,
    sample_reference,
    threefry2x32_reference,
)
from kernels_pallas.sampling.xla.backend import sample

SAMPLE = jax.jit(sample)


def arrays(params: list[RowParams], vocab_size: int, *, logprobs: bool = True) -> tuple[SamplingInputs, SamplingState]:
    """Return the sampler's inputs and state for some rows; the last state row is the spare one."""
    rows = len(params) + 1
    state = SamplingState(
        np.zeros((rows, vocab_size), np.int32),
        np.full((rows, 16), vocab_size, np.int32),
        np.zeros((rows, 16), np.float32),
        np.full((rows, 8), vocab_size, np.int32),
    )
    for row, p in enumerate(params):
        for token, count in (p.counts or {}).items():
            state.counts_RV[row, token] = count
        for index, (token, bias) in enumerate((p.bias or {}).items()):
            state.bias_ids_RJ[row, index], state.bias_values_RJ[row, index] = token, bias
        state.stop_ids_RJ[row, : len(p.forbidden)] = p.forbidden

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(p, name) for p in params], dtype)

    mask_BW = np.zeros((len(params), mask_words(vocab_size)), np.int32)
    for row, p in enumerate(params):
        for token in p.allowed or ():
            mask_BW.view(np.uint32)[row, token // 32] |= np.uint32(1 << token % 32)

    inputs = SamplingInputs(
        row_B=np.arange(len(params), dtype=np.int32),
        target_B=np.full(len(params), -1, np.int32),
        position_B=column("position", np.int32),
        seed_B2=np.array([[p.seed & 0xFFFFFFFF, p.seed >> 32] for p in params], np.uint32),
        temperature_B=column("temperature", np.float32),
        top_k_B=np.array([p.top_k if p.top_k > 0 else vocab_size for p in params], np.int32),
        top_p_B=column("top_p", np.float32),
        min_p_B=column("min_p", np.float32),
        frequency_B=column("frequency", np.float32),
        presence_B=column("presence", np.float32),
        repetition_B=column("repetition", np.float32),
        biased_B=np.array([bool(p.bias) for p in params]),
        forbid_stops_B=np.array([bool(p.forbidden) for p in params]),
        logprobs_B=np.full(len(params), logprobs),
        masked_B=np.array([p.allowed is not None for p in params]),
        mask_BW=mask_BW,
    )
    return jax.tree.map(jnp.asarray, inputs), jax.tree.map(jnp.asarray, state)


def random_logits(rows: int, vocab_size: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(rows).standard_normal((rows, vocab_size)) * scale).astype(np.float32)


GRID = [
    RowParams(
        seed=seed * 0x9E3779B97F4A7C15 % 2**64, position=seed * 7, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, frequency=0.7 * (seed % 2), presence=0.3 * (seed % 3), repetition=1 + 0.2 * (seed % 4),
        counts={seed: 2, seed + 5: 1}, bias={3 * seed: 4.0, seed + 1: -100.0 if seed % 2 else 1.5}, forbidden=(seed,),
        allowed=None if seed % 3 else tuple(range(seed % 2, 999, 7)),
    )
    for seed, (temperature, top_k, top_p, min_p) in enumerate(
        itertools.product((0.0, 0.5, 1.0, 1.7), (-1, 1, 20, 400), (1.0, 0.9, 0.2), (0.0, 0.1))
    )
]  # fmt: skip


def test_matches_numpy_over_the_whole_grid() -> None:
    logits = random_logits(len(GRID), 1000)
    out = SAMPLE(jnp.asarray(logits), *arrays(GRID, 1000))
    want = [sample_reference(row, params) for row, params in zip(logits, GRID, strict=True)]
    assert out.token_B.tolist() == [token for token, _ in want]
    np.testing.assert_allclose(out.logprob_B, [logprob for _, logprob in want], atol=1e-4)
    assert out.finite_B.all()


def test_top_logprobs_are_the_likeliest_in_order() -> None:
    params = [RowParams(seed=1), RowParams(temperature=0), RowParams(bias={5: 9.0})]
    logits = random_logits(3, 300)
    out = SAMPLE(jnp.asarray(logits), *arrays(params, 300))
    for row, p in enumerate(params):
        adjusted = adjusted_logits(logits[row], p)
        order = np.argsort(-adjusted, kind="stable")[:NUM_TOP_LOGPROBS]
        assert out.top_ids_BJ[row].tolist() == order.tolist()
        want = adjusted[order] - np.logaddexp.reduce(adjusted)
        np.testing.assert_allclose(out.top_logprobs_BJ[row], want, atol=1e-4)


def test_filters_that_reach_past_the_candidates_are_exact() -> None:
    """With flat logits, a top-p of 0.99 keeps thousands of tokens."""
    logits = random_logits(8, 5000, scale=0.1)
    params = [RowParams(seed=i, top_p=0.99, min_p=0.3 * (i % 2)) for i in range(8)]
    out = SAMPLE(jnp.asarray(logits), *arrays(params, 5000))
    assert out.token_B.tolist() == [sample_reference(row, p)[0] for row, p in zip(logits, params, strict=True)]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = random_logits(len(GRID), 1000)
    together = SAMPLE(jnp.asarray(logits), *arrays(GRID, 1000)).token_B
    for row in range(0, len(GRID), 7):
        alone = SAMPLE(jnp.asarray(logits[row : row + 1]), *arrays([GRID[row]], 1000)).token_B
        assert alone[0] == together[row]


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_reported(bad: float, temperature: float) -> None:
    logits = random_logits(3, 100)
    logits[1, 17] = bad
    out = SAMPLE(jnp.asarray(logits), *arrays([RowParams(temperature=temperature)] * 3, 100, logprobs=False))
    assert out.finite_B.tolist() == [True, False, True]


def test_a_row_with_nothing_allowed_is_reported() -> None:
    logits = random_logits(2, 4)
    params = [RowParams(forbidden=(0, 1, 2, 3)), RowParams(forbidden=(0, 1, 2))]
    out = SAMPLE(jnp.asarray(logits), *arrays(params, 4))
    assert out.finite_B.tolist() == [False, True]
    assert out.token_B[1] == 3


def test_target_gives_the_plain_logprob_of_a_token() -> None:
    logits = random_logits(2, 100)
    inputs, state = arrays([RowParams(temperature=0)] * 2, 100)
    out = SAMPLE(jnp.asarray(logits), inputs._replace(target_B=jnp.asarray([42, -1], jnp.int32)), state)
    assert out.token_B.tolist() == [42, int(logits[1].argmax())]
    np.testing.assert_allclose(out.logprob_B[0], logits[0, 42] - np.logaddexp.reduce(logits[0]), atol=1e-5)


def test_threefry_is_the_published_cipher() -> None:
    """The known answers for 20 rounds are those of the Random123 distribution."""
    known = {
        ((0, 0), (0, 0)): (0x6B200159, 0x99BA4EFE),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2): (0x1CB996FC, 0xBB002BE7),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)): (0xC4923A9C, 0x483DF7A0),
    }
    for (key, counter), want in known.items():
        got = threefry2x32(tuple(map(jnp.uint32, key)), tuple(map(jnp.uint32, counter)))
        assert tuple(map(int, got)) == want == threefry2x32_reference(key, counter)


def test_noise_is_gumbel_distributed() -> None:
    noise = np.asarray(gumbel_noise(jnp.asarray([[1, 2]], jnp.uint32), jnp.asarray([3]), jnp.arange(100_000)[None]))
    # The mean is Euler's constant, the variance pi^2 / 6; the tolerance is five standard errors of 1e5 samples.
    assert abs(noise.mean() - 0.5772) < 5 * 1.2825 / 100_000**0.5
    assert abs(noise.var() - 1.6449) < 0.06
    assert np.isfinite(noise).all()
