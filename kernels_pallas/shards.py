"""Running a function on each shard of a replica.

Replicas lie along the mesh axis `data`. Two more axes split a replica, `expert` and `model`. Experts lie over the
first, and each of them over the second; everything else knows them as one.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

DATA = "data"
EXPERT = "expert"
IN_EXPERT = "model"
MODEL = (EXPERT, IN_EXPERT)


def model_size(mesh: Mesh | AbstractMesh) -> int:
    """Devices of one replica."""
    return math.prod(mesh.shape[axis] for axis in MODEL)


def over_model(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` on the shards that `in_specs` make, with no axis left to the compiler.

    Inside a step that is split over `data` already, that axis is taken, and the mesh in force is used.
    """
    current = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        function,
        mesh=mesh if current.empty else None,
        axis_names=set(mesh.axis_names) - set(current.manual_axes),
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )
