"""Options of the device's compiler that a step needs."""

from collections.abc import Mapping

from jax.sharding import Mesh

# By device kind. tpu7x's compiler prefers 16-bit arrays in tiles of 16 rows, but arguments arrive in tiles of 8: it
# would copy all layers' weights into the other layout in every step (by its own figures 14 GB for an 8B model).
_OPTIONS: Mapping[str, dict[str, str]] = {"TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": "0"}}


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """For programs on a mesh; None where the defaults will do."""
    return _OPTIONS.get(mesh.devices.flat[0].device_kind)
