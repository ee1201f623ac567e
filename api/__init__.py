"""The HTTP server: OpenAI's and Anthropic's APIs on Litestar. This package never imports jax."""
