"""RMSNorm: x / rms(x) * (weight + offset) over the last axis (arXiv:1910.07467), in f32.

Dimension key: T tokens, D channels.
"""

from typing import NamedTuple, Protocol

import jax

from kernels_pallas.stacked import Stacked


class NormWeight(NamedTuple):
    """The weight of a norm, and its constants.

    Attributes:
        weight: one layer of weights [L, D].
        eps: addend of the mean square.
        offset: addend of the weight.
    """

    weight: Stacked
    eps: float
    offset: float = 0.0


class RmsNorm(Protocol):
    """Normalises the activations of each token."""

    def __call__(
        self, x_TD: jax.Array, norm: NormWeight, added_TD: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return `x + added`, and the same normalised; both in x's dtype.

        Args:
            x_TD: activations; without `added_TD` they may have more channels, of which the first D are normalised.
            norm: the norm's weight.
            added_TD: addend, or None for zeros; the sum is rounded to x's dtype before it is normalised.
        """
        ...
