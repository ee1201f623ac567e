"""Portable XLA: runs anywhere, and is the CPU path."""
