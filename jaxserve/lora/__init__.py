"""LoRA adapters: low-rank deltas to a model's weights (arXiv:2106.09685)."""
