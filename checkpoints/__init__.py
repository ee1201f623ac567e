"""Reads and writes checkpoints as named tensors, without knowledge of the models."""
