"""Loading and unloading of LoRA adapters."""
