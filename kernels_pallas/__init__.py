"""JAX ops and their kernels. Imports nothing else of this project."""
