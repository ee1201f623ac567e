"""Parses tool calls in model output, and writes the grammars that enforce them. Never imports jax."""
