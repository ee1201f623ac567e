"""The adapters that a step can use: the LoRA matrices of all slots side by side, by module of the model.

A pool is a tree of the model's modules. Where adapters may change linear modules it has a node for each group of them
that reads the same activations, under the name of the first: one array `a` of their first matrices, one below the
other in the order of the modules' names, and in `b` the second matrix of each by its name. Slot 0, for rows without an
adapter, has no place in the arrays: slot s is at index s - 1.

Dimension key: L layers, S slots, E experts where a module has them, R rank, I inputs, O outputs, J = modules of a
group * R.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.lora.delta import EMBEDDING, AdapterDelta, adaptable
from jaxserve.lora.ops import GroupSplit
from jaxserve.models.decoder import Decoder
from jaxserve.models.param_spec import ParamSpec, Path, Weights
from jaxserve.parallel.mesh import partition_spec
from kernels_pallas.grouped_matmul.api import ExpertShape
from kernels_pallas.lora_matmul.api import LoraModule


class LoraPoolLayout(NamedTuple):
    """Sizes of a LoRA pool.

    Attributes:
        num_slots: slot 0 included.
        rank: rank of any adapter, at most; those of a lower one are filled up with zeros.
        paths: weights that adapters may change.
        rank_multiple: the ranks of the pool are a multiple of this, which the devices need.
    """

    num_slots: int
    rank: int
    paths: tuple[Path, ...]
    rank_multiple: int = 1

    @property
    def padded_rank(self) -> int:
        """Rank of the matrices in the pool."""
        return -(-self.rank // self.rank_multiple) * self.rank_multiple


def lora_pool_specs(decoder: Decoder, layout: LoraPoolLayout) -> dict[Path, ParamSpec]:
    """Specs of a group's `a` [(L,) S, (E,) J, I] and each `b` [(L,) S, (E,) R, O], split like the weights' axes."""
    specs: dict[Path, ParamSpec] = {}
    weights = adaptable(decoder)

    def lora_spec(base: ParamSpec, rank: int, axis: int) -> ParamSpec:
        size = base.num_inputs if axis == -1 else base.shape[axis]
        at = int(base.stacked)
        shape = (*base.shape[:at], layout.num_slots - 1, *base.shape[at:-2], rank, size)
        axes = (*base.axes[:at], None, *base.axes[at:-2], None, base.axes[axis])
        return ParamSpec(shape, decoder.dtype, axes, base.layers)

    for group, paths in _groups(decoder, layout).items():
        specs[*group, "a"] = lora_spec(weights[paths[0]], len(paths) * layout.padded_rank, -1)
        for path in paths:
            specs[*group, "b", path[-2]] = lora_spec(weights[path], layout.padded_rank, -2)
    return specs


def lora_pool_splits(decoder: Decoder, layout: LoraPoolLayout, mesh: Mesh) -> dict[Path, GroupSplit]:
    """How each group lies on a mesh."""
    specs = lora_pool_specs(decoder, layout)

    def split(path: Path) -> bool:
        return partition_spec(specs[path].axes, specs[path].shape, mesh)[-1] is not None

    return {
        group: GroupSplit(split((*group, "a")), {path[-2]: split((*group, "b", path[-2])) for path in paths})
        for group, paths in _groups(decoder, layout).items()
    }


def lora_modules(decoder: Decoder, layout: LoraPoolLayout, mesh: Mesh) -> dict[Path, list[LoraModule]]:
    """The linear modules that adapters may change, as one device has them, by their group."""
    specs = lora_pool_specs(decoder, layout)

    def size(path: Path) -> int:
        return specs[path].shard_shape(mesh)[-1]

    def module(group: Path, path: Path) -> LoraModule:
        return LoraModule(size((*group, "a")), size((*group, "b", path[-2])), layout.padded_rank, decoder.dtype)

    weights = adaptable(decoder)
    return {
        group: [module(group, path) for path in paths]
        for group, paths in _groups(decoder, layout).items()
        # Rows of the embedding are looked up; what is taken apart is portable XLA's.
        if not (paths[0] == EMBEDDING or weights[paths[0]].of_experts or weights[paths[0]].absorbed_only)
    }


def lora_expert_shapes(decoder: Decoder, layout: LoraPoolLayout, mesh: Mesh) -> set[ExpertShape]:
    """Shapes of the experts' factors on one device."""
    specs, weights = lora_pool_specs(decoder, layout), adaptable(decoder)
    shapes: set[ExpertShape] = set()
    for group, paths in _groups(decoder, layout).items():
        for path in paths if weights[paths[0]].of_experts else ():
            *_, rank, num_inputs = specs[*group, "a"].shard_shape(mesh)
            num_outputs = specs[*group, "b", path[-2]].shard_shape(mesh)[-1]
            shapes.add(ExpertShape(rank, num_inputs, decoder.dtype))
            shapes.add(ExpertShape(num_outputs, rank, decoder.dtype, transposed=True))
    return shapes


def _groups(decoder: Decoder, layout: LoraPoolLayout) -> dict[Path, list[Path]]:
    """Nodes of the pool and the weights of their modules, in the order of their names."""
    groups: dict[Path, list[Path]] = {}
    for path in sorted(layout.paths):
        parent = path[:-2]
        names = (other for other in decoder.lora_group(path[:-1]) if (*parent, other, "weight") in layout.paths)
        groups.setdefault((*parent, min(names)), []).append(path)
    return groups


def lora_pool_bytes(decoder: Decoder, layout: LoraPoolLayout, mesh: Mesh) -> int:
    """Bytes of a pool on each device."""
    return sum(spec.shard_bytes(mesh) for spec in lora_pool_specs(decoder, layout).values())


def slot_leaves(delta: AdapterDelta, specs: Mapping[Path, ParamSpec]) -> dict[Path, np.ndarray]:
    """An adapter as a slot holds it, on the host: `a` [(L,) (E,) J, I] and scale * each `b` [(L,) (E,) R, O]."""
    leaves = {path: np.zeros(slot_spec(spec).shape, spec.dtype) for path, spec in specs.items()}
    for path, leaf in leaves.items():
        if path[-1] == "a":
            continue
        *group, _, name = path
        lora = delta.weights.get((*group[:-1], name, "weight"))
        if lora is None:
            continue
        members = sorted(other[-1] for other in specs if other[:-1] == path[:-1])
        first = leaf.shape[-2] * members.index(name)
        with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at the values
            leaves[*group, "a"][..., first : first + delta.rank, :] = lora.a
            leaf[..., : delta.rank, :] = np.swapaxes(lora.b, -1, -2) * lora.scale[..., None, None]
    return leaves


def slot_spec(spec: ParamSpec) -> ParamSpec:
    """Spec of one slot of a leaf: without the slot axis, which comes after the layer axis."""
    at = int(spec.stacked)
    shape, axes = (*spec.shape[:at], *spec.shape[at + 1 :]), (*spec.axes[:at], *spec.axes[at + 1 :])
    return ParamSpec(shape, spec.dtype, axes, spec.layers)


def write_slot(pool: Weights, slot: jax.Array, contents: Weights) -> Weights:
    """Put an adapter into a slot."""

    def write(path: tuple[Any, ...], leaf: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(leaf, new, slot - 1, axis=int(path[0].key == "layers"))

    return jax.tree_util.tree_map_with_path(write, pool, contents)
