"""Loading and unloading LoRA adapters at runtime."""
