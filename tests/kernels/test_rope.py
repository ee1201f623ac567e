"""Rotary position embedding against numpy in float64; the Pallas kernel runs interpreted, with race detection."""

import jax
import pytest

from kernels_pallas.rope.cases import RopeCase, rope_case
from kernels_pallas.rope.xla.backend import rope
from tests.support.kernels import KERNELS, interpreted


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [((6, 2), 128), ((96, 8), 64), ((8, 1), 96), ((4, 4), 20)])
@pytest.mark.parametrize("name", ["xla", KERNELS[1]])
def test_heads_match_numpy(name: str, heads: tuple[int, int], head_dim: int, normalized: bool) -> None:
    """104 heads take two thread blocks, the second of which has queries and keys; 20 channels use portable XLA."""
    case = RopeCase(num_tokens=3, num_heads=heads, head_dim=head_dim, normalized=normalized)
    step = rope_case(rope if name == "xla" else interpreted(name).rope(), case)
    step.verify(jax.jit(step.run)(*step.arguments))
