"""Compiler options that a step needs, by kind of device."""

from collections.abc import Mapping

from jax.sharding import Mesh

# By device kind. The compiler for tpu7x prefers 16-bit arrays in tiles of 16 rows, but arguments arrive in tiles of 8:
# it would relayout the weights of all layers in every step (14 GB for an 8B model by the compiler's own figures).
_OPTIONS: Mapping[str, dict[str, str]] = {"TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": "0"}}


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Return the options for programs on a mesh; None if the defaults suffice."""
    return _OPTIONS.get(mesh.devices.flat[0].device_kind)
