"""Routing: the choice of each token's experts, and the weights of their outputs.

Dimension key: T tokens, E experts, U experts of a token, G groups of experts.
"""

from typing import Literal, NamedTuple, Protocol, TypeAlias

import jax

from kernels_pallas.stacked import Stacked

RouterScores: TypeAlias = Literal["softmax", "softmax_of_chosen", "sigmoid"]
# All sigmoid scores of a token may be zero.
SMALLEST_SUM = 1e-20


class RouterConfig(NamedTuple):
    """How experts are chosen; ties go to the lower index.

    Attributes:
        top_k: experts per token.
        scores: scores from logits: softmax over all experts, softmax over the chosen experts, or sigmoid.
        normalize: the weights of a token's experts are divided by their sum.
        scale: multiplier of the weights.
        num_groups, top_groups: groups of consecutive experts, and groups from which a token's experts are chosen: those
            whose best scores have the highest sum (arXiv:2412.19437, section 2.1.2).
        group_scores: best scores that are summed per group.
    """

    top_k: int
    scores: RouterScores = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_scores: int = 2


class Routing(NamedTuple):
    """The chosen experts of each token, best first.

    Attributes:
        id_TU: i32 indices of the experts.
        weight_TU: f32 weights of the experts' outputs.
    """

    id_TU: jax.Array
    weight_TU: jax.Array


class Router(Protocol):
    """Chooses the experts with the highest scores."""

    def __call__(self, logits_TE: jax.Array, correction: Stacked | None = None) -> Routing:
        """Choose the experts of each token.

        Args:
            logits_TE: f32 logits of the router.
            correction: one layer of f32 biases [L, E], added to the scores only to choose experts (arXiv:2408.15664).
        """
        ...
