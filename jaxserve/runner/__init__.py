"""Compiles steps and runs them on the devices; the only package that jits them."""
