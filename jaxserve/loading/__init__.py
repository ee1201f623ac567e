"""Model folders and files into weights on devices."""
