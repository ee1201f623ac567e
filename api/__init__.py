"""The HTTP side: OpenAI's wire format over Litestar. Never imports jax."""
