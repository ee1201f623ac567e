"""Which share of a device's memory is whose. Imports no jax: the engine process reads it before jax is there."""

# The share of a GPU that the engine process takes. The rest is left to the driver and the libraries.
GPU_MEM_FRACTION = 0.95
# The share of what the weights leave free that the KV pool takes by default. The rest is for temporaries.
DEVICE_MEM_FRACTION = 0.88
