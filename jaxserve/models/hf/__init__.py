"""Hugging Face's `config.json`, quantisation settings and tensor names."""
