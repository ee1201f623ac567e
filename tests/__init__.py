"""Tests. Folders mirror the kinds: unit, kernels, properties, parity, api, e2e."""
