"""RMSNorm against numpy in float64; the Pallas kernel runs in interpret mode, with race detection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.parallel.mesh import make_mesh
from kernels_pallas.rms_norm.api import NormWeight, RmsNorm
from kernels_pallas.rms_norm.reference import rms_norm as reference
from kernels_pallas.rms_norm.xla.backend import rms_norm
from kernels_pallas.stacked import Stacked

needs_pallas = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")


def implementation(name: str, num_devices: int = 1) -> RmsNorm:
    if name == "xla":
        return rms_norm
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels_pallas.rms_norm.gpu.backend import GpuRmsNorm

    return GpuRmsNorm(make_mesh(num_devices), plgpu.InterpretGPUParams(detect_races=True))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("size", "offset"), [(128, 0.0), (576, 1.0), (2880, 0.0), (64, 0.0)])
@pytest.mark.parametrize("name", ["xla", pytest.param("gpu", marks=needs_pallas)])
def test_norms_match_numpy(name: str, size: int, offset: float, added: bool) -> None:
    """576 and 2,880 channels are no whole number of threads; 64 are fewer than there are."""
    rng = np.random.default_rng(size)
    x_TD, added_TD = (jnp.asarray(rng.standard_normal((5, size)) * 3, jnp.bfloat16) for _ in range(2))
    weights_LD = jnp.asarray(rng.standard_normal((3, size)), jnp.bfloat16)
    norm = implementation(name)

    @jax.jit
    def run(x_TD: jax.Array, added_TD: jax.Array | None, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        return norm(x_TD, NormWeight(Stacked(weights_LD, layer), 1e-6, offset), added_TD)

    sum_TD, got_TD = run(x_TD, added_TD if added else None, jnp.int32(1))
    np.testing.assert_array_equal(sum_TD, x_TD + added_TD if added else x_TD)
    assert got_TD.dtype == jnp.bfloat16
    want_TD = reference(np.asarray(sum_TD), np.asarray(weights_LD)[1], 1e-6, offset)
    np.testing.assert_allclose(np.asarray(got_TD, np.float64), want_TD, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", ["xla", pytest.param("gpu", marks=needs_pallas)])
def test_more_channels_than_weights(name: str) -> None:
    """MLA normalises the latent channels, which the rotated ones follow."""
    rng = np.random.default_rng(1)
    x_TJ = jnp.asarray(rng.standard_normal((4, 576)), jnp.bfloat16)
    weights_LD = jnp.asarray(rng.standard_normal((1, 512)), jnp.bfloat16)
    norm = implementation(name)
    got_TD = jax.jit(lambda x, layer: norm(x, NormWeight(Stacked(weights_LD, layer), 1e-6))[1])(x_TJ, jnp.int32(0))
    want_TD = reference(np.asarray(x_TJ)[:, :512], np.asarray(weights_LD)[0], 1e-6)
    np.testing.assert_allclose(np.asarray(got_TD, np.float64), want_TD, rtol=2**-7, atol=1e-6)
