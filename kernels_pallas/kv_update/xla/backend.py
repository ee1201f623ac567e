"""Write keys or values into their pages in portable XLA."""

import jax


def write_tokens(pages_PKSH: jax.Array, page_T: jax.Array, slot_T: jax.Array, new_TKH: jax.Array) -> jax.Array:
    """Put each token's keys or values into its slot of its page; pages past the end are dropped."""
    return pages_PKSH.at[page_T, :, slot_T].set(new_TKH, mode="drop")
