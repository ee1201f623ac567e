"""Tests, with one folder per kind: unit, kernels, properties, parity, api, compile, e2e."""
