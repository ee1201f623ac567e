"""Compiled steps on the devices; the only caller of jit."""
