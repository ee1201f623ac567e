"""Array functions. Imports jax and nothing of ours but itself."""
