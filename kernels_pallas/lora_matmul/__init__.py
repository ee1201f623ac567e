"""Low-rank updates of many adapters at once."""
