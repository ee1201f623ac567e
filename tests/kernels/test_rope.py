"""Rotary position embedding against numpy in float64; the Pallas kernel runs interpreted, with race detection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.parallel.mesh import make_mesh
from kernels_pallas.rms_norm.api import NormWeight
from kernels_pallas.rms_norm.reference import rms_norm
from kernels_pallas.rope.api import Angles, HeadNorms, Rope
from kernels_pallas.rope.reference import rotate
from kernels_pallas.rope.xla.backend import rope
from kernels_pallas.stacked import Stacked

needs_pallas = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
NUM_TOKENS = 3


def implementation(name: str) -> Rope:
    if name == "xla":
        return rope
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels_pallas.rope.gpu.backend import GpuRope

    return GpuRope(make_mesh(1), plgpu.InterpretGPUParams(detect_races=True))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [((6, 2), 128), ((96, 8), 64), ((8, 1), 96), ((4, 4), 20)])
@pytest.mark.parametrize("name", ["xla", pytest.param("gpu", marks=needs_pallas)])
def test_heads_match_numpy(name: str, heads: tuple[int, int], head_dim: int, normalized: bool) -> None:
    """104 heads take two thread blocks, the second of which has queries and keys; 20 channels use portable XLA."""
    rng = np.random.default_rng(head_dim)
    q, k = (jnp.asarray(rng.standard_normal((NUM_TOKENS, number, head_dim)), jnp.bfloat16) for number in heads)
    angle_TC = rng.uniform(0, 6, (NUM_TOKENS, head_dim // 2))
    angles = Angles(*(jnp.asarray(each(angle_TC), jnp.float32) for each in (np.cos, np.sin)))
    stacks = [jnp.asarray(rng.uniform(0.5, 2, (3, head_dim)), jnp.bfloat16) for _ in range(2)]
    impl = implementation(name)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        norms = HeadNorms(*(NormWeight(Stacked(stack, layer), 1e-6, 1.0) for stack in stacks))
        return impl(q, k, angles, norms if normalized else None)

    got = run(q, k, jnp.int32(1))
    for x, stack, result in zip((q, k), stacks, got, strict=True):
        want = np.asarray(x, np.float64)
        if normalized:
            # Rounded as in the models.
            want = rms_norm(want, np.asarray(stack)[1], 1e-6, 1.0)
            want = np.asarray(jnp.asarray(want, jnp.bfloat16), np.float64)
        want = rotate(want, *map(np.asarray, angles))
        assert result.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(result, np.float64), want, rtol=2**-7, atol=2**-6 if normalized else 1e-6)
