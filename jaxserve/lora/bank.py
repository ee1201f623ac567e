"""The adapters that a step can use: factors of all slots side by side, by module of the model.

A bank is a tree of the model's modules with two arrays at each that adapters may change. Slot 0, of rows without an
adapter, takes no room: slot s is at s - 1.

Dimension key: L layers, S slots, R rank, I inputs, O outputs.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.lora.delta import EMBEDDING, AdapterDelta, adaptable
from jaxserve.mesh import named_sharding, partition_spec
from jaxserve.models.decoder import Decoder, ParamSpec, Path, Weights
from kernels_pallas.lora_matmul.api import LoraModule, Split


class BankLayout(NamedTuple):
    """Sizes of a bank.

    Attributes:
        num_slots: slot 0 included.
        rank: of any adapter, at most; those of a lower one are filled up with zeros.
        paths: weights that adapters may change.
        rank_multiple: that the devices want of the factors in the bank.
    """

    num_slots: int
    rank: int
    paths: tuple[Path, ...]
    rank_multiple: int = 1

    @property
    def padded_rank(self) -> int:
        """Of the factors in the bank."""
        return -(-self.rank // self.rank_multiple) * self.rank_multiple


def bank_specs(decoder: Decoder, layout: BankLayout) -> dict[Path, ParamSpec]:
    """Of a module's `a` [(L,) S, R, I] and `b` [(L,) S, R, O]: split over devices as the weight's own axes are."""
    specs: dict[Path, ParamSpec] = {}
    weights = adaptable(decoder)
    for path in layout.paths:
        base = weights[path]
        lead = base.shape[:-2]
        for name, axis in (("a", -1), ("b", -2)):
            shape = (*lead, layout.num_slots - 1, layout.padded_rank, base.shape[axis])
            axes = (*base.axes[:-2], None, None, base.axes[axis])
            specs[*path[:-1], name] = ParamSpec(shape, base.dtype, axes, base.stacked)
    return specs


def bank_splits(decoder: Decoder, layout: BankLayout, mesh: Mesh) -> dict[Path, Split]:
    """Which axis of each weight the mesh axis `model` splits, by the module's path."""
    weights = adaptable(decoder)
    splits: dict[Path, Split] = {}
    for path in layout.paths:
        axes = partition_spec(weights[path].axes[-2:], weights[path].shape[-2:], mesh)
        splits[path[:-1]] = "outputs" if axes[0] else "inputs" if axes[1] else None
    return splits


def lora_modules(decoder: Decoder, layout: BankLayout, mesh: Mesh) -> list[LoraModule]:
    """The linear modules that adapters may change, as one device has them."""
    specs = bank_specs(decoder, layout)
    modules: list[LoraModule] = []
    for path in layout.paths:
        if path == EMBEDDING:  # rows of it are looked up
            continue
        (inputs, _), (outputs, dtype) = (
            (named_sharding(spec.axes, spec.shape, mesh).shard_shape(spec.shape)[-1], spec.dtype)
            for spec in (specs[*path[:-1], name] for name in "ab")
        )
        modules.append(LoraModule(inputs, outputs, layout.padded_rank, dtype))
    return modules


def bank_bytes(decoder: Decoder, layout: BankLayout, mesh: Mesh) -> int:
    """Of a bank, on each device."""
    return sum(
        math.prod(named_sharding(spec.axes, spec.shape, mesh).shard_shape(spec.shape)) * spec.dtype.itemsize
        for spec in bank_specs(decoder, layout).values()
    )


def slot_leaves(delta: AdapterDelta, specs: Mapping[Path, ParamSpec]) -> dict[Path, np.ndarray]:
    """An adapter as a slot holds it, on the host: `a` [(L,) R, I] and scale * `b` [(L,) R, O] of each module."""
    leaves: dict[Path, np.ndarray] = {}
    for path, spec in specs.items():
        *lead, _, rank, size = spec.shape
        leaves[path] = np.zeros((*lead, rank, size), spec.dtype)
        factor = delta.factors.get((*path[:-1], "weight"))
        if factor is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at the values
                values = factor.a if path[-1] == "a" else np.swapaxes(factor.b, -1, -2) * factor.scale[..., None, None]
                leaves[path][..., : delta.rank, :] = values
    return leaves


def write_slot(bank: Weights, slot: jax.Array, contents: Weights) -> Weights:
    """Put an adapter into a slot."""
    return jax.tree.map(
        lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, slot - 1, leaf.ndim - 3), bank, contents
    )


def empty_bank(shapes: Weights) -> Weights:
    """Slots that change nothing."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)
