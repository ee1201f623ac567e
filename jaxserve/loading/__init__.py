"""Loads model folders and files into weights on devices."""
