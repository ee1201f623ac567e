"""jaxserve: an OpenAI-compatible inference server for open models, in JAX."""
