"""Reads adapter folders and fits them to a model and its LoRA slots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoints.orbax_adapters import is_orbax_adapter, read_adapter
from checkpoints.source import CheckpointError
from jaxserve.errors import AdapterError, LaunchError
from jaxserve.lora.delta import AdapterDelta, adaptable, make_delta, module_name
from jaxserve.lora.pool import LoraPoolLayout, lora_pool_specs, slot_leaves
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.param_spec import Path as TreePath
from jaxserve.runner_protocol import LoadedAdapter, loaded_adapter

# PEFT's name for all linear modules but the head, and SGLang's names for all modules and for the projections it fuses.
_ALL_LINEAR, _ALL = "all-linear", "all"
_FUSED: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_NOT_LINEAR = ("embed_tokens", "lm_head")


class AdapterReader(NamedTuple):
    """Reads adapters for one model.

    Attributes:
        decoder: the model.
        names: the tensor in the checkpoint of each weight, by path in the tree.
        num_hosts: number of hosts that run the model.
    """

    decoder: Decoder
    names: Mapping[TreePath, TensorName]
    num_hosts: int = 1

    def read(self, folder: Path) -> AdapterDelta:
        """See `make_delta`.

        Raises:
            AdapterError: the folder cannot be read, or does not fit the model.
        """
        if self.num_hosts > 1 and is_orbax_adapter(folder):
            # Orbax restores on all hosts together, but only host 0 may know of this folder.
            raise AdapterError(f"{folder} is an Orbax folder, which several hosts cannot read; use the PEFT folder")
        try:
            return make_delta(read_adapter(folder), self.decoder, self.names)
        except CheckpointError as error:
            raise AdapterError(str(error)) from None

    def target_paths(self, modules: Sequence[str]) -> set[TreePath]:
        """Return the weights of modules by the names of PEFT and SGLang, such as `q_proj`, `all-linear` and `all`.

        Raises:
            LaunchError: the model has no such module.
        """
        paths: dict[str, set[TreePath]] = {}
        for path in adaptable(self.decoder):
            paths.setdefault(module_name(path, self.names).rpartition(".")[-1], set()).add(path)
        linear = [name for name in paths if name not in _NOT_LINEAR]
        several = {**_FUSED, _ALL_LINEAR: linear, _ALL: list(paths)}
        wanted = [
            name for module in modules for name in ([module] if module in paths else several.get(module, [module]))
        ]
        if unknown := [name for name in wanted if name not in paths]:
            raise LaunchError(
                f"--lora-target-modules {unknown[0]}: the model has {', '.join(sorted(paths))}; also known: "
                f"{', '.join(several)}"
            )
        return {path for name in wanted for path in paths[name]}


class SlotReader:
    """Reads adapters into the layout of a LoRA pool's slots.

    Args:
        reader: reads adapters for the model.
        layout: layout of the LoRA pool.
    """

    def __init__(self, reader: AdapterReader, layout: LoraPoolLayout) -> None:
        self._reader = reader
        self._layout = layout
        self._specs = lora_pool_specs(reader.decoder, layout)

    def __call__(self, folder: str) -> LoadedAdapter:
        """Read a folder.

        Raises:
            AdapterError: the folder cannot be read, or does not fit the model or a slot.
        """
        return self.fit(self._reader.read(Path(folder)))

    def fit(self, delta: AdapterDelta) -> LoadedAdapter:
        """Convert an adapter to the layout of a slot.

        Raises:
            AdapterError: the rank is too large, slots do not cover a module, or a scaled value overflows the dtype.
        """
        if delta.rank > self._layout.rank:
            raise AdapterError(f"rank {delta.rank} is more than --max-lora-rank {self._layout.rank}")
        if others := sorted(delta.weights.keys() - set(self._layout.paths)):
            names = ", ".join(
                dict.fromkeys(module_name(path, self._reader.names).rpartition(".")[-1] for path in others)
            )
            raise AdapterError(f"it changes {names}, which are not among --lora-target-modules")
        leaves = slot_leaves(delta, self._specs)
        for path, leaf in leaves.items():
            # Where tokens are multiplied with all slots, a non-finite value would reach rows of other adapters.
            if not np.isfinite(leaf.astype(np.float32)).all():
                raise AdapterError(f"{'.'.join(path)}: its values times alpha / r are too large for {leaf.dtype}")
        return loaded_adapter(leaves)
