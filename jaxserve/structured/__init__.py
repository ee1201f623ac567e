"""What constrains an output: grammars, and the length of thinking. Never imports jax."""
