"""Constraints on outputs: grammars, and limits on thinking. Never imports jax."""
