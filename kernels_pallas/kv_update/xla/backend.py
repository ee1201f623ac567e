"""Write keys or values into their pages in portable XLA."""

import jax


def write_tokens(pages_PKSH: jax.Array, page_T: jax.Array, slot_T: jax.Array, new_TKH: jax.Array) -> jax.Array:
    """Write each token's keys or values to its slot of its page; writes past the last page are dropped."""
    return pages_PKSH.at[page_T, :, slot_T].set(new_TKH, mode="drop")
