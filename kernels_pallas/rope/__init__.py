"""Rotary position embedding of queries and keys, with their norms."""
