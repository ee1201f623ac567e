"""RMSNorms whose results are known."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.kernel_case import KernelCase
from kernels_pallas.rms_norm.api import NormWeight, RmsNorm
from kernels_pallas.rms_norm.reference import rms_norm as reference
from kernels_pallas.stacked import Stacked

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class NormCase:
    """A norm.

    Attributes:
        num_tokens: number of tokens.
        size: channels that are normalised, the first ones.
        num_channels: channels of a token; by default `size`.
        offset: added to the weights.
        added: whether something is added to the activations before.
    """

    num_tokens: int
    size: int
    num_channels: int | None = None
    offset: float = 0.0
    added: bool = False


def norm_case(norm: RmsNorm, case: NormCase) -> KernelCase:
    """Return a norm with the weights of the second of three layers."""
    rng = np.random.default_rng(case.size)
    shape = (case.num_tokens, case.num_channels or case.size)
    x_TD, added_TD = (jnp.asarray(rng.standard_normal(shape) * 3, jnp.bfloat16) for _ in range(2))
    weights_LD = jnp.asarray(rng.standard_normal((3, case.size)), jnp.bfloat16)

    def run(
        x_TD: jax.Array, added_TD: jax.Array, weights_LD: jax.Array, layer: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        weight = NormWeight(Stacked(weights_LD, layer), _EPS, case.offset)
        return norm(x_TD, weight, added_TD if case.added else None)

    def verify(result: tuple[jax.Array, jax.Array]) -> None:
        sum_TD, got_TD = (np.asarray(x.astype(jnp.float32)) for x in result)
        np.testing.assert_array_equal(sum_TD, np.asarray((x_TD + added_TD if case.added else x_TD).astype(jnp.float32)))
        assert result[1].dtype == jnp.bfloat16
        want_TD = reference(sum_TD[:, : case.size], np.asarray(weights_LD)[1], _EPS, case.offset)
        np.testing.assert_allclose(got_TD, want_TD, rtol=2**-7, atol=1e-6)

    return KernelCase(run=run, arguments=(x_TD, added_TD, weights_LD, jnp.int32(1)), verify=verify)
