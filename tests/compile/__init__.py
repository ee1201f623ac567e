"""Proofs from programs that are compiled for devices that are not attached.

This file makes the folder a package: without it, pytest would keep the package-scoped fixtures of `conftest.py` until
the end of the session, and every later test would compile with all optimisations and without the cache.
"""
