"""A TPU's matrix unit."""

import jax
import jax.numpy as jnp


def mxu_dot(left: jax.Array, right: jax.Array, *, contract: int) -> jax.Array:
    """The last axis of `left` with axis `contract` of `right`, both matrices, f32.

    Sums are in f32; f32 itself is not rounded to bf16 first, as the unit would.
    """
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left, right, (((1,), (contract,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
