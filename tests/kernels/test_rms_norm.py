"""RMSNorm against numpy in float64; the Pallas kernel runs in interpret mode, with race detection."""

import jax
import pytest

from kernels_pallas.rms_norm.api import RmsNorm
from kernels_pallas.rms_norm.cases import NormCase, norm_case
from kernels_pallas.rms_norm.xla.backend import rms_norm
from tests.support.kernels import KERNELS, interpreted


def check(name: str, case: NormCase) -> None:
    norm: RmsNorm = rms_norm if name == "xla" else interpreted(name).norm()
    step = norm_case(norm, case)
    step.verify(jax.jit(step.run)(*step.arguments))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("size", "offset"), [(128, 0.0), (576, 1.0), (2880, 0.0), (64, 0.0)])
@pytest.mark.parametrize("name", ["xla", KERNELS[1]])
def test_norms_match_numpy(name: str, size: int, offset: float, added: bool) -> None:
    """576 and 2,880 channels are no whole number of threads; 64 are fewer than there are."""
    check(name, NormCase(num_tokens=5, size=size, offset=offset, added=added))


@pytest.mark.parametrize("name", ["xla", KERNELS[1]])
def test_more_channels_than_weights(name: str) -> None:
    """MLA normalises the latent channels, which the rotated ones follow."""
    check(name, NormCase(num_tokens=4, size=512, num_channels=576))
