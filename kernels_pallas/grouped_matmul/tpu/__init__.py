"""Pallas Mosaic TPU kernels."""
