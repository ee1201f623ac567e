"""A model laid out on devices, present or not: memory, kernels, shapes of a step. No weight is read."""
