"""LoRA matmuls of a batch with many adapters."""
