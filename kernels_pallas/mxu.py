"""Matrix products on the MXU, the matrix unit of a TPU."""

import jax
import jax.numpy as jnp


def mxu_dot(left: jax.Array, right: jax.Array, *, contract: int) -> jax.Array:
    """Contract the last axis of `left` with axis `contract` of `right`; both are matrices, the result is f32.

    Sums are in f32. f32 operands are not rounded to bf16 first, as the MXU would do by default. The MXU takes 8-bit
    elements of `right` with bf16 ones of `left`; to convert them before takes up to three times as long as the product.
    """
    precision = None
    if left.dtype == jnp.float32:
        precision, right = jax.lax.Precision.HIGHEST, right.astype(jnp.float32)
    return jax.lax.dot_general(
        left, right, (((1,), (contract,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
