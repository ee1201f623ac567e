"""Calibration of the scales of an integer KV cache from the peaks of a float cache."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.kv_calibration import _LARGEST, _MARGIN, _SMALLEST, _scales
from kernels_pallas.paged_attention.api import AttentionConfig
from kernels_pallas.paged_attention.xla.backend import XlaAttention

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 2, 4


def scales(k_PKSH: np.ndarray, v_PKSH: np.ndarray, rope_dim: int = HEAD_DIM) -> tuple[np.ndarray, bool]:
    """Return the peaks that the scales of a cache with two replicas allow, and whether the cache is finite."""
    config = AttentionConfig(
        num_layers=NUM_LAYERS, num_q_heads=2, num_kv_heads=NUM_HEADS, head_dim=HEAD_DIM, page_size=8, num_pages=3,
        dtype=jnp.float32, scale=1.0,
    )  # fmt: skip
    cache = {"k": jnp.asarray(k_PKSH), "v": jnp.asarray(v_PKSH)}
    found, finite = _scales(XlaAttention(config, make_mesh(1)), rope_dim, 2, cache)
    return np.asarray(found) * _LARGEST / _MARGIN, bool(finite)


def empty() -> np.ndarray:
    return np.zeros((2 * NUM_LAYERS * 3, NUM_HEADS, 8, HEAD_DIM), np.float32)


def test_peak_is_the_maximum_over_positions_and_replicas() -> None:
    rng = np.random.default_rng(0)
    values = 1 + rng.random((12, NUM_HEADS, 8, HEAD_DIM), np.float32)
    got, finite = scales(empty(), -values)
    want = values.reshape(2, NUM_LAYERS, 3, NUM_HEADS, 8, HEAD_DIM).max((0, 2, 4))
    np.testing.assert_allclose(got[:, 1], want, rtol=1e-6)
    assert finite


def test_a_rotated_pair_has_the_larger_of_both() -> None:
    """A slow rotation moves one channel of a pair into the other only at positions that were not run."""
    keys = empty()
    keys[0, 0, 0] = 8, 5, 2, 6
    np.testing.assert_allclose(scales(keys, empty())[0][0, 0, 0], [8, 6, 8, 6], rtol=1e-6)
    # Only the last channels of a latent vector are rotated.
    np.testing.assert_allclose(scales(keys, empty(), rope_dim=2)[0][0, 0, 0], [8, 5, 6, 6], rtol=1e-6)


def test_scale_has_a_floor_relative_to_the_head_peak() -> None:
    values = empty()
    values[3, 1, 2, 0] = 16
    got, _ = scales(empty(), values)
    np.testing.assert_allclose(got[1, 1, 1], [16, *[16 * _SMALLEST] * 3], rtol=1e-6)
    # Nothing is known of a head that was always 0: its scales are 1.
    np.testing.assert_allclose(got[0, 1], _LARGEST / _MARGIN, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_calibration_reports_non_finite_cache(bad: float) -> None:
    keys = empty()
    keys[5, 0, 3, 1] = bad
    assert not scales(keys, empty())[1]
