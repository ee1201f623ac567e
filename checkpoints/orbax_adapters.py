"""LoRA adapters as Orbax folders: the LoRA A and B matrices by module name, and a manifest.

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
    """Shapes of one module's LoRA matrices, A [rank, inputs] and B [outputs, rank], and the scale of B A.

    The matrices of a parameter with all experts have `experts` as their leading axis; other modules have 0 experts.
    """

    rank: int
    inputs: int
    outputs: int
    scale: float
    experts: int = 0

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of the matrices."""
        return (self.experts,) if self.experts else ()


class AdapterManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Describes the contents of an adapter folder.

    Attributes:
        base_model: name of the base model, as the adapter's author wrote it.
        modules: shapes by Hugging Face module name.
        format: format of the folder.
    """

    base_model: str | None
    modules: dict[str, ModuleShape]
    format: str = _FORMAT


def is_orbax_adapter(folder: Path) -> bool:
    """Return whether `save_adapter` wrote the folder."""
    return (folder / _MANIFEST).is_file()


def read_adapter(folder: Path) -> PeftAdapter:
    """Read an adapter folder in Orbax or PEFT format.

    Raises:
        CheckpointError: the folder is broken, or the adapter needs an unsupported feature.
    """
    return restore_adapter(folder) if is_orbax_adapter(folder) else read_peft(folder)


def save_adapter(folder: Path, adapter: PeftAdapter) -> None:
    """Write an adapter into a folder; the manifest is written last and marks the folder as complete."""
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
    """Read an adapter that `save_adapter` wrote.

    Raises:
        CheckpointError: the folder is broken, or values are not finite.
    """
    manifest = read_manifest(folder / _MANIFEST, AdapterManifest, _FORMAT)
    # NumPy arrays are restored as NumPy arrays: adapters stay in host memory.
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
