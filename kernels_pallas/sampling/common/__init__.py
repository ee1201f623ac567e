"""Code that the implementations share."""
