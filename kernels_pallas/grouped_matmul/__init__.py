"""Products of sorted rows with a matrix of their own group."""
