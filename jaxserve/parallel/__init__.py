"""Meshes, and how arrays are split over them."""
