"""Separates a model's thinking from its answer. Never imports jax."""
