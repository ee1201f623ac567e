"""LoRA adapters as Orbax folders: the factors by module name, beside a manifest.

jaxserve-adapter.json     names and shapes of the modules (`AdapterManifest`)
factors/                  the arrays, written and restored by Orbax
"""

from pathlib import Path

import msgspec
import numpy as np
import orbax.checkpoint as ocp

from checkpoints.adapters import AdapterTensors, PeftAdapter, read_peft
from checkpoints.orbax_io import read_manifest, restore_tree
from checkpoints.source import CheckpointError

_MANIFEST = "jaxserve-adapter.json"
_ARRAYS = "factors"
_FORMAT = "orbax-adapter"


class ModuleShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One module's factors: a [rank, inputs], b [outputs, rank], and what multiplies their product.

    Those of all experts of a layer have them along an axis in front; others are of 0 experts.
    """

    rank: int
    inputs: int
    outputs: int
    scale: float
    experts: int = 0

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes in front."""
        return (self.experts,) if self.experts else ()


class AdapterManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an adapter folder holds.

    Attributes:
        base_model: what it was trained on, as its maker named it.
        modules: by Hugging Face module name.
        format: format of the folder.
    """

    base_model: str | None
    modules: dict[str, ModuleShape]
    format: str = _FORMAT


def is_orbax_adapter(folder: Path) -> bool:
    """Whether `save_adapter` wrote the folder."""
    return (folder / _MANIFEST).is_file()


def read_adapter(folder: Path) -> PeftAdapter:
    """Read an adapter folder of either kind.

    Raises:
        CheckpointError: it is broken, or asks for what is not supported.
    """
    return restore_adapter(folder) if is_orbax_adapter(folder) else read_peft(folder)


def save_adapter(folder: Path, adapter: PeftAdapter) -> None:
    """Write an adapter into a folder; the manifest comes last, so it marks a whole one."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: {"a": tensors.a_RI, "b": tensors.b_OR} for name, tensors in adapter.modules.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / _ARRAYS, arrays)
    shapes = {
        name: ModuleShape(
            rank=tensors.a_RI.shape[-2],
            inputs=tensors.a_RI.shape[-1],
            outputs=tensors.b_OR.shape[-2],
            scale=tensors.scale,
            experts=len(tensors.a_RI) if tensors.a_RI.ndim > 2 else 0,
        )
        for name, tensors in adapter.modules.items()
    }
    manifest = AdapterManifest(base_model=adapter.base_model, modules=shapes)
    (folder / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))


def restore_adapter(folder: Path) -> PeftAdapter:
    """Read what `save_adapter` wrote.

    Raises:
        CheckpointError: the folder is broken, or values are not finite.
    """
    manifest = read_manifest(folder / _MANIFEST, AdapterManifest, _FORMAT)
    # Arrays of numpy are restored as such: adapters stay on the host.
    abstract = {
        name: {
            "a": np.empty((*shape.lead, shape.rank, shape.inputs), np.float32),
            "b": np.empty((*shape.lead, shape.outputs, shape.rank), np.float32),
        }
        for name, shape in manifest.modules.items()
    }
    arrays = restore_tree(folder / _ARRAYS, abstract)
    modules = {
        name: AdapterTensors(np.asarray(arrays[name]["a"]), np.asarray(arrays[name]["b"]), shape.scale)
        for name, shape in manifest.modules.items()
    }
    for name, tensors in modules.items():
        shapes = {leaf: array.shape for leaf, array in abstract[name].items()}
        if shapes != {"a": tensors.a_RI.shape, "b": tensors.b_OR.shape}:
            raise CheckpointError(f"{folder / _ARRAYS}: {name}: the manifest asks for {shapes}")
        if not (np.isfinite(tensors.a_RI).all() and np.isfinite(tensors.b_OR).all() and np.isfinite(tensors.scale)):
            raise CheckpointError(f"{folder}: {name}: values that are not finite")
    if not modules:
        raise CheckpointError(f"{folder}: no module is adapted")
    return PeftAdapter(manifest.base_model, modules)
