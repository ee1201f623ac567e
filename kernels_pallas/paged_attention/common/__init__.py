"""Code shared by the implementations."""
