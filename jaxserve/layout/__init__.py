"""Lays a model out on devices, present or not: memory, kernels and shapes of a step. Reads no weights."""
