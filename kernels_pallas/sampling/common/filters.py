"""Top-k, top-p and min-p on a list of the likeliest tokens. Plain XLA.

Dimension key: B rows of logits, K candidates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.sampling.api import SamplingInputs
from kernels_pallas.sampling.common.random import gumbel_noise
from kernels_pallas.sampling.common.summary import Candidates, unbounded_top_p


class Sampled(NamedTuple):
    """Tokens sampled from candidates.

    Attributes:
        token_B: i32; meaningless where undecided.
        undecided_B: bool, the filters may keep tokens that are not candidates.
    """

    token_B: jax.Array
    undecided_B: jax.Array


def sample_from_candidates(candidates: Candidates, log_sum_B: jax.Array, inputs: SamplingInputs) -> Sampled:
    """Sample from the candidates that top-k, top-p and min-p keep, and find the rows where they may keep more.

    The filters keep a prefix of the row in order of value. The candidates above the bound certainly form a prefix, and
    all tokens after it are at most the bound: if a token with exactly that value would not be kept next, no token is.
    """
    top_p_B = unbounded_top_p(inputs)
    mass_BK = jnp.exp(candidates.value_BK - log_sum_B[:, None])
    before_BK = jnp.cumsum(mass_BK, axis=1) - mass_BK
    kept_BK = (
        (jnp.arange(mass_BK.shape[1]) < inputs.top_k_B[:, None])
        & (before_BK <= top_p_B[:, None])
        & (mass_BK >= inputs.min_p_B[:, None] * mass_BK[:, :1])
    )
    noise_BK = gumbel_noise(inputs.seed_B2, inputs.position_B, candidates.id_BK)
    best_B1 = jnp.argmax(jnp.where(kept_BK, candidates.value_BK + noise_BK, -jnp.inf), axis=1)[:, None]
    token_B = jnp.take_along_axis(candidates.id_BK, best_B1, axis=1)[:, 0]

    certain_BK = candidates.value_BK > candidates.bound_B[:, None]
    next_kept_B = (
        (jnp.sum(certain_BK, axis=1) < inputs.top_k_B)
        & (jnp.sum(jnp.where(certain_BK, mass_BK, 0.0), axis=1) <= top_p_B)
        & (jnp.exp(candidates.bound_B - log_sum_B) >= inputs.min_p_B * mass_BK[:, 0])
    )
    return Sampled(token_B, next_kept_B & (candidates.bound_B > -jnp.inf))
