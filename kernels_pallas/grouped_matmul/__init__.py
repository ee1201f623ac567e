"""Grouped matmuls: sorted rows times the matrix of their group."""
