"""The LoRA pool: the LoRA A and B matrices of all slots, by module of the model.

A pool is a tree like that of the model's modules. It has one node for each group of adaptable linear modules that read
the same activations, named after the first of them. The node's `a` is one array of their A matrices, concatenated along
the rank axis in the order of the modules' names; `b` contains the B matrix of each module by its name. Slot 0, for rows
without an adapter, is not stored: slot s is at index s - 1.

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
        num_slots: number of slots, slot 0 included.
        rank: maximum rank of an adapter; matrices of lower rank are padded with zeros.
        paths: weights that adapters may change.
        rank_multiple: the pool's rank is rounded up to a multiple of this, as the devices need.
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
    """Return specs of each group's `a` [(L,) S, (E,) J, I] and `b`s [(L,) S, (E,) R, O], sharded like the weights."""
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
    """Return how each group is split over a mesh."""
    specs = lora_pool_specs(decoder, layout)

    def split(path: Path) -> bool:
        return partition_spec(specs[path].axes, specs[path].shape, mesh)[-1] is not None

    return {
        group: GroupSplit(split((*group, "a")), {path[-2]: split((*group, "b", path[-2])) for path in paths})
        for group, paths in _groups(decoder, layout).items()
    }


def lora_modules(decoder: Decoder, layout: LoraPoolLayout, mesh: Mesh) -> dict[Path, list[LoraModule]]:
    """Return the linear modules that adapters may change by group, with the sizes of one device's shard."""
    specs = lora_pool_specs(decoder, layout)

    def size(path: Path) -> int:
        return specs[path].shard_shape(mesh)[-1]

    def module(group: Path, path: Path) -> LoraModule:
        return LoraModule(size((*group, "a")), size((*group, "b", path[-2])), layout.padded_rank, decoder.dtype)

    weights = adaptable(decoder)
    return {
        group: [module(group, path) for path in paths]
        for group, paths in _groups(decoder, layout).items()
        # The embedding is a lookup, experts use a grouped matmul, and weights that MLA absorbs use portable XLA.
        if not (paths[0] == EMBEDDING or weights[paths[0]].of_experts or weights[paths[0]].absorbed_only)
    }


def lora_expert_shapes(decoder: Decoder, layout: LoraPoolLayout, mesh: Mesh) -> set[ExpertShape]:
    """Return the shapes of the experts' A and B matrices on one device."""
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
    """Return the nodes of the pool with the weights of their modules, in the order of their names."""
    groups: dict[Path, list[Path]] = {}
    for path in sorted(layout.paths):
        parent = path[:-2]
        names = (other for other in decoder.lora_group(path[:-1]) if (*parent, other, "weight") in layout.paths)
        groups.setdefault((*parent, min(names)), []).append(path)
    return groups


def lora_pool_bytes(decoder: Decoder, layout: LoraPoolLayout, mesh: Mesh) -> int:
    """Return the bytes of a pool on each device."""
    return sum(spec.shard_bytes(mesh) for spec in lora_pool_specs(decoder, layout).values())


def slot_leaves(delta: AdapterDelta, specs: Mapping[Path, ParamSpec]) -> dict[Path, np.ndarray]:
    """Return an adapter in the layout of a slot, on the host: `a` [(L,) (E,) J, I], scale * `b`s [(L,) (E,) R, O]."""
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
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks the values
            leaves[*group, "a"][..., first : first + delta.rank, :] = lora.a
            leaf[..., : delta.rank, :] = np.swapaxes(lora.b, -1, -2) * lora.scale[..., None, None]
    return leaves


def slot_spec(spec: ParamSpec) -> ParamSpec:
    """Return the spec of one slot of a leaf: without the slot axis, which comes after the layer axis."""
    at = int(spec.stacked)
    shape, axes = (*spec.shape[:at], *spec.shape[at + 1 :]), (*spec.axes[:at], *spec.axes[at + 1 :])
    return ParamSpec(shape, spec.dtype, axes, spec.layers)


def write_slot(pool: Weights, slot: jax.Array, contents: Weights) -> Weights:
    """Write an adapter into a slot."""

    def write(path: tuple[Any, ...], leaf: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(leaf, new, slot - 1, axis=int(path[0].key == "layers"))

    return jax.tree_util.tree_map_with_path(write, pool, contents)
