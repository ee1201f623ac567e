"""Model architectures: config, tensor names and forward pass."""
