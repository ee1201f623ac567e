"""Finds tool calls in a model's output, and writes the grammars that force them. Never imports jax."""
