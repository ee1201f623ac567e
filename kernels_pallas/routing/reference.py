"""Routing in numpy float64, token by token."""

import numpy as np

from kernels_pallas.routing.api import RouterConfig


def route(logits_TE: np.ndarray, correction_E: np.ndarray | None, config: RouterConfig) -> list[dict[int, float]]:
    """Return the weights of each token's experts by index; see `Router`."""
    return [_route_token(logits_E.astype(np.float64), correction_E, config) for logits_E in logits_TE]


def _route_token(logits_E: np.ndarray, correction_E: np.ndarray | None, config: RouterConfig) -> dict[int, float]:
    scores_E = {
        "softmax": lambda: _softmax(logits_E),
        "softmax_of_chosen": lambda: logits_E,
        "sigmoid": lambda: 1 / (1 + np.exp(-logits_E)),
    }[config.scores]()
    ranked_E = scores_E.copy() if correction_E is None else scores_E + correction_E
    groups = np.split(np.arange(len(ranked_E)), config.num_groups)
    sums = [np.sort(ranked_E[group])[-config.group_scores :].sum() for group in groups]
    best = np.argsort([-each for each in sums], kind="stable")[: config.top_groups]
    candidates = [int(expert) for group in sorted(best) for expert in groups[group]]
    chosen = sorted(candidates, key=lambda expert: (-ranked_E[expert], expert))[: config.top_k]
    weights = scores_E[chosen]
    if config.scores == "softmax_of_chosen":
        weights = _softmax(weights)
    elif config.normalize:
        weights = weights / weights.sum()
    return dict(zip(chosen, weights * config.scale, strict=True))


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()
