"""Pallas as this project uses it: the one module to look at when a JAX release moves a name.

Needs JAX 0.11 or newer, so only the kernels import it, and they are imported once a backend has been chosen.
"""

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["pl", "pltpu"]
