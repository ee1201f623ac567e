"""Rows that the candidates do not decide: what a search for their tokens is given and returns.

Dimension key: B rows of logits, J top log-probabilities.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax


class Exact(NamedTuple):
    """Sampled tokens and the largest values of each row.

    Attributes:
        token_B: i32.
        top_ids_BJ, top_BJ: i32 and f32, the `NUM_TOP_LOGPROBS` largest values, in order.
    """

    token_B: jax.Array
    top_ids_BJ: jax.Array
    top_BJ: jax.Array


class Known(NamedTuple):
    """Results of the pass over the rows.

    Attributes:
        bound_B: f32; where undecided, the filters keep all larger values.
        max_B: f32, the largest value.
        log_sum_B: f32, log of the sum of exp.
        undecided_B: bool, the token is not decided yet.
        short_B: bool, the `NUM_TOP_LOGPROBS` largest values are not decided yet.
    """

    bound_B: jax.Array
    max_B: jax.Array
    log_sum_B: jax.Array
    undecided_B: jax.Array
    short_B: jax.Array


Search = Callable[[Exact, Known], Exact]
"""Redo the rows that are undecided or short; the others keep what was found."""
