"""Helpers shared by tests: fakes, tiny checkpoints, marks, and the store of compile outcomes."""
