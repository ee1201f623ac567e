"""`jaxserve convert SOURCE DESTINATION`: writes an Orbax folder from any checkpoint that jaxserve can open.

SOURCE may also be a PEFT adapter. The result is served like any other model: `jaxserve serve --model-path DESTINATION`.
Its weights are restored directly into the shards of the mesh that serves it.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import jax

from checkpoints import orbax_io
from checkpoints.adapters import read_peft
from checkpoints.orbax_adapters import save_adapter
from checkpoints.source import CheckpointError
from jaxserve.config import EngineConfig
from jaxserve.errors import AdapterError, LaunchError
from jaxserve.layers.args import DecoderArgs
from jaxserve.layout.layout import pick_dtype
from jaxserve.loading.checkpoint import OrbaxCheckpoint, open_checkpoint
from jaxserve.loading.hub import find_adapter, find_model
from jaxserve.loading.weights import load_weights
from jaxserve.lora.merge import merge_adapter
from jaxserve.lora.reader import AdapterReader
from jaxserve.models.registry import find_architecture
from jaxserve.parallel.mesh import make_mesh
from jaxserve.text.tokenizer import load_tokenizer

_SMALL_FILES = ("generation_config.json", "chat_template.jinja")


def convert(name: str, destination: Path, dtype_name: str, adapter: str | None = None) -> None:
    """Convert a checkpoint, with `adapter` merged into its weights if given.

    Raises:
        LaunchError: the source or the adapter cannot be read, or the destination is not empty.
        AdapterError: the adapter does not fit the model.
    """
    _check_empty(destination)
    path = find_model(name, None, None)
    source = open_checkpoint(path)
    if isinstance(source, OrbaxCheckpoint):
        raise LaunchError(f"{path} is an Orbax folder already")
    architecture = find_architecture(source.config)
    model = architecture.model_config(source.config)
    dtype = pick_dtype(EngineConfig(model_path=name, dtype=dtype_name), model)  # type: ignore[arg-type]
    decoder = architecture.build(DecoderArgs(model, dtype))
    names = architecture.tensor_names(model)
    weights = load_weights(source, decoder, names, make_mesh(1), lambda paths: paths)
    source.close()
    if adapter is not None:
        weights = merge_adapter(weights, AdapterReader(decoder, names).read(find_adapter(adapter, None)))

    destination.mkdir(parents=True, exist_ok=True)
    (destination / "config.json").write_text(json.dumps({**source.config, "dtype": str(dtype)}, indent=2))
    load_tokenizer(path).save(destination)
    for file in _SMALL_FILES:
        if path.is_dir() and (path / file).exists():
            shutil.copy(path / file, destination / file)
    source_label = name if adapter is None else f"{name} with {adapter}"
    manifest = orbax_io.Manifest(architecture=model.architecture, dtype=str(dtype), source=source_label)
    orbax_io.save(destination, weights, manifest)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    print(f"wrote {size / 1e6:.0f} MB of {dtype} to {destination}")


def convert_adapter(source: Path, destination: Path) -> None:
    """Convert a PEFT adapter.

    Raises:
        LaunchError: the destination is not empty.
        CheckpointError: the source cannot be read.
    """
    _check_empty(destination)
    adapter = read_peft(source)
    save_adapter(destination, adapter)
    print(f"wrote {len(adapter.modules)} modules with a maximum rank of {adapter.rank} to {destination}")


def _check_empty(destination: Path) -> None:
    if destination.exists() and any(destination.iterdir()):
        raise LaunchError(f"{destination} is not empty")


def main() -> int:
    """Parse arguments and convert."""
    parser = argparse.ArgumentParser(prog="jaxserve convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="Hugging Face id, model folder, .gguf file, 'demo', or PEFT folder")
    parser.add_argument("destination", type=Path, help="folder to write; must be empty or absent")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--merge-lora", help="folder or Hugging Face id of an adapter to add to the weights")
    args = parser.parse_args()
    try:
        if (Path(args.source) / "adapter_config.json").is_file():
            convert_adapter(Path(args.source), args.destination)
        else:
            convert(args.source, args.destination, args.dtype, args.merge_lora)
    except (LaunchError, AdapterError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
