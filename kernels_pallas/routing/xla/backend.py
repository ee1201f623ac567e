"""Routing in portable XLA."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.routing.api import SMALLEST_SUM, RouterConfig, RouterScores, Routing
from kernels_pallas.stacked import Stacked

_SCORES: Mapping[RouterScores, Callable[[jax.Array], jax.Array]] = {
    "softmax": partial(jax.nn.softmax, axis=-1),
    "softmax_of_chosen": lambda logits: logits,
    "sigmoid": jax.nn.sigmoid,
}


class XlaRouter:
    """A `Router`."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config

    def __call__(self, logits_TE: jax.Array, correction: Stacked | None = None) -> Routing:
        """See `Router`."""
        config = self._config
        scores_TE = _SCORES[config.scores](logits_TE)
        ranked_TE = scores_TE if correction is None else scores_TE + correction.slice()
        if config.top_groups < config.num_groups:
            ranked_TE = jnp.where(_in_best_groups(ranked_TE, config), ranked_TE, -jnp.inf)
        _, id_TU = lax.top_k(ranked_TE, config.top_k)
        weight_TU = jnp.take_along_axis(scores_TE, id_TU, axis=-1)
        if config.scores == "softmax_of_chosen":
            weight_TU = jax.nn.softmax(weight_TU, axis=-1)
        elif config.normalize:
            weight_TU = weight_TU / jnp.maximum(jnp.sum(weight_TU, axis=-1, keepdims=True), SMALLEST_SUM)
        return Routing(id_TU, weight_TU * config.scale)


def _in_best_groups(scores_TE: jax.Array, config: RouterConfig) -> jax.Array:
    """Return whether each expert is in one of the token's best groups, bool[T, E]."""
    num_tokens, num_experts = scores_TE.shape
    best_TGU, _ = lax.top_k(scores_TE.reshape(num_tokens, config.num_groups, -1), config.group_scores)
    _, group_TU = lax.top_k(jnp.sum(best_TGU, axis=-1), config.top_groups)
    chosen_TG = jnp.any(group_TU[:, :, None] == jnp.arange(config.num_groups), axis=1)
    return jnp.repeat(chosen_TG, num_experts // config.num_groups, axis=1)
