"""Matrix products on the MXU, the matrix unit of a TPU."""

import jax
import jax.numpy as jnp


def mxu_dot(left: jax.Array, right: jax.Array, *, contract: int) -> jax.Array:
    """Contract the last axis of `left` with axis `contract` of `right`; both are matrices, the result is f32.

    Sums are in f32. f32 operands are not rounded to bf16 first, as the MXU would do by default.
    """
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left, right, (((1,), (contract,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
