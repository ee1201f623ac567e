"""Running a function on each shard of a replica.

The mesh axis `data` holds the replicas. Two more axes, `expert` and `model`, split a replica: experts are distributed
over `expert` and each expert is split over `model`; everything else treats the two as one axis.
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
    """Return the number of devices of one replica."""
    return math.prod(mesh.shape[axis] for axis in MODEL)


def over_model(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Wrap `function` to run on the shards given by `in_specs`, with all mesh axes manual.

    Inside a step that is already split over `data`, that axis is manual already, and the current mesh is used.
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
