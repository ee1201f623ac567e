"""Routings whose results are known."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.kernel_case import KernelCase
from kernels_pallas.routing.api import Router, RouterConfig, Routing
from kernels_pallas.routing.reference import route
from kernels_pallas.stacked import Stacked


def random_logits(num_tokens: int, num_experts: int) -> np.ndarray:
    """Return logits without ties, f32[T, E]."""
    return np.random.default_rng(num_experts).standard_normal((num_tokens, num_experts)).astype(np.float32)


def tied_logits(num_experts: int) -> np.ndarray:
    """Return logits of three tokens, many of which are equal, f32[3, E]; whole groups of experts are equal."""
    logits_E = np.tile(np.array([0, 1, -1, 1], np.float32), -(-num_experts // 4))[:num_experts]
    return np.stack([logits_E, np.zeros(num_experts, np.float32), -logits_E])


def routing_case(router: Router, config: RouterConfig, logits_TE: np.ndarray, *, corrected: bool) -> KernelCase:
    """Return the experts of tokens.

    Args:
        router: the implementation.
        config: its settings.
        logits_TE: the tokens' logits.
        corrected: whether the choice is corrected, by the biases of the second of three layers.
    """
    rng = np.random.default_rng(1)
    corrections = jnp.asarray(rng.standard_normal((3, logits_TE.shape[1])) / 10, jnp.float32)

    def run(logits_TE: jax.Array, corrections: jax.Array, layer: jax.Array) -> Routing:
        return router(logits_TE, Stacked(corrections, layer) if corrected else None)

    def verify(got: Routing) -> None:
        want = route(logits_TE, np.asarray(corrections)[1] if corrected else None, config)
        for id_U, weight_U, expected in zip(np.asarray(got.id_TU), np.asarray(got.weight_TU), want, strict=True):
            assert list(id_U) == list(expected), f"experts {list(id_U)}, not {list(expected)}"
            np.testing.assert_allclose(weight_U, list(expected.values()), rtol=1e-5)

    return KernelCase(run=run, arguments=(jnp.asarray(logits_TE), corrections, jnp.int32(1)), verify=verify)
