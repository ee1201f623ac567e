"""Compiler options that a step needs, by kind of device."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from kernels_pallas.dispatch import PLATFORM_BACKENDS

# By device kind. The compiler for tpu7x prefers 16-bit arrays in tiles of 16 rows, but arguments arrive in tiles of 8:
# it would relayout the weights of all layers in every step (14 GB for an 8B model by the compiler's own figures).
_TPU: Mapping[str, dict[str, Any]] = {"TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": "0"}}
# On GPU, XLA reads a layer's weights in the stack of all layers only where a product is a cuBLAS call and its operand
# is one slice. Triton's products, and products that are merged because they share an operand, copy the weights first.
# Rematerialisation would repeat such copies: it allows 80 % of the memory, and weights and KV pool are more.
_GPU: dict[str, Any] = {
    "xla_disable_hlo_passes": "rematerialization",
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_enable_triton_gemm": False,
}


# What XLA captures in CUDA graphs: the defaults of jaxlib 0.12.0, and loops. The host would wait for the condition of a
# loop whose trips are counted on the device.
_GPU_LOOPS = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE"}


def compiler_options(mesh: Mesh, *, counts_on_device: bool = False) -> dict[str, Any] | None:
    """Return the options for programs on a mesh; None if the defaults suffice.

    Args:
        mesh: mesh of the devices.
        counts_on_device: whether a layer has a loop whose number of trips is computed on the device.
    """
    device = mesh.devices.flat[0]
    if PLATFORM_BACKENDS.get(device.platform) == "gpu":
        return _GPU | _GPU_LOOPS if counts_on_device else _GPU
    return _TPU.get(device.device_kind)
