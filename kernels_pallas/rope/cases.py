"""Rotary position embeddings whose results are known."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.kernel_case import KernelCase
from kernels_pallas.rms_norm.api import NormWeight
from kernels_pallas.rms_norm.reference import rms_norm
from kernels_pallas.rope.api import Angles, HeadNorms, Rope
from kernels_pallas.rope.reference import rotate
from kernels_pallas.stacked import Stacked

_EPS, _OFFSET = 1e-6, 1.0


@dataclass(frozen=True, kw_only=True)
class RopeCase:
    """Heads to rotate.

    Attributes:
        num_tokens: number of tokens.
        num_heads: query heads and key heads.
        head_dim: channels of a head.
        normalized: whether each head is normalised first.
    """

    num_tokens: int
    num_heads: tuple[int, int]
    head_dim: int
    normalized: bool = False


def rope_case(rope: Rope, case: RopeCase) -> KernelCase:
    """Return rotated heads; norms have the weights of the second of three layers."""
    rng = np.random.default_rng(case.head_dim)
    shapes = [(case.num_tokens, number, case.head_dim) for number in case.num_heads]
    q, k = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    angle_TC = rng.uniform(0, 6, (case.num_tokens, case.head_dim // 2))
    angles = Angles(*(jnp.asarray(each(angle_TC), jnp.float32) for each in (np.cos, np.sin)))
    stacks = [jnp.asarray(rng.uniform(0.5, 2, (3, case.head_dim)), jnp.bfloat16) for _ in range(2)]

    def run(
        q: jax.Array, k: jax.Array, angles: Angles, stacks: list[jax.Array], layer: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        norms = HeadNorms(*(NormWeight(Stacked(stack, layer), _EPS, _OFFSET) for stack in stacks))
        return rope(q, k, angles, norms if case.normalized else None)

    def verify(result: tuple[jax.Array, jax.Array]) -> None:
        for x, stack, got in zip((q, k), stacks, result, strict=True):
            want = np.asarray(x, np.float64)
            if case.normalized:
                want = rms_norm(want, np.asarray(stack)[1], _EPS, _OFFSET)
                # Rounded as in the models.
                want = np.asarray(jnp.asarray(want, jnp.bfloat16), np.float64)
            want = rotate(want, *map(np.asarray, angles))
            assert got.dtype == jnp.bfloat16
            atol = 2**-6 if case.normalized else 1e-6
            np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-7, atol=atol)

    return KernelCase(run=run, arguments=(q, k, angles, stacks, jnp.int32(1)), verify=verify)
