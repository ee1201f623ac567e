"""Architectures: configuration, tensor names, forward pass."""
