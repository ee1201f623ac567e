"""Default shares of device memory. Imports no jax: the engine process reads them before it imports jax."""

# The share of a GPU's memory that the engine process takes. The rest is left to the driver and the libraries.
GPU_MEM_FRACTION = 0.95
# The KV pool's default share of the memory that the weights leave free. The rest is for temporaries.
DEVICE_MEM_FRACTION = 0.88
