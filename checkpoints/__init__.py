"""Bytes to named tensors and back. Knows no model."""
