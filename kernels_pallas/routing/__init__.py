"""Routing: the choice of each token's experts."""
