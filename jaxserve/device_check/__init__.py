"""Checks the kernels on the devices at hand: whether they are right, how fast they are, and which tiles are fastest."""
