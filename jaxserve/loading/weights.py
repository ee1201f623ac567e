"""Loads weights from a checkpoint directly into their dtype and sharding.

One shard of a stacked parameter is assembled at a time and sent to its devices, so the host never holds more of the
model than one shard.
"""

import functools
import logging
import math
import operator
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import jax
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from checkpoints import orbax_io
from checkpoints.quantized import Dequantizer, Quantizer, dequantizing, quantizing
from checkpoints.source import Index, TensorSource
from jaxserve.errors import LaunchError
from jaxserve.loading.kv_heads import repeat_heads, replicated_head_rows
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.param_spec import ParamSpec, Path, Weights, tree_of
from jaxserve.parallel.mesh import named_sharding, weight_format

logger = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[Iterable[Path]], Iterable[Path]]

# Buffers that some exporters save and no model reads.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
# Scales of an FP8 KV cache. They are ignored: jaxserve casts to FP8 without scales, as the format's exponents suffice.
_KV_SCALES = (".k_scale", ".v_scale", ".kv_scale")
_MAX_LISTED = 20
_CHUNK_BYTES = 16 << 20
_ALIGNMENT = 64


def load_weights(
    source: TensorSource,
    decoder: Decoder,
    names: dict[Path, TensorName],
    mesh: Mesh,
    progress: Progress,
) -> Weights:
    """Read every weight of `decoder` that is stored in checkpoints.

    Args:
        source: the open checkpoint.
        decoder: the model.
        names: the tensor in the checkpoint of each weight, by path in the tree.
        mesh: the devices that the weights are sent to.
        progress: wraps the list of paths to show a progress bar.

    Raises:
        LaunchError: tensors are missing, unknown or of the wrong shape; the message lists them.
    """
    names = {**names, **_names_of_blocks(decoder, names)}
    source = _dequantized_as(source, decoder, names)
    _check_tensors(source, decoder, names)

    def load(path: Path) -> jax.Array:
        spec = decoder.param_specs[path]
        reader = _ParamReader(source, spec, names[path], replicated_head_rows(spec, decoder.args))
        return _array_of_shards(spec, mesh, reader.read)

    weights = tree_of((path, load(path)) for path in progress(list(_loaded(decoder))))
    return jax.block_until_ready(weights)


def _array_of_shards(spec: ParamSpec, mesh: Mesh, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """Read a weight shard by shard, each shard once even if several devices hold it."""
    sharding = named_sharding(spec.axes, spec.shape, mesh)
    row_major = weight_format(spec.axes, spec.shape, mesh)
    holders: dict[str, tuple[Index, list[Format | Sharding]]] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        assert index is not None
        key = str(index)  # slices cannot be hashed before Python 3.12
        holders.setdefault(key, (index, []))[1].append(_placement(row_major, SingleDeviceSharding(device)))
    shards: list[jax.Array] = []
    for index, placements in holders.values():
        values = read(index)
        shards += jax.block_until_ready([jax.device_put(values, each, may_alias=True) for each in placements])
        del values  # free the host's memory before the next shard is read
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, shards)


def _placement(row_major: Format, sharding: Sharding) -> Format | Sharding:
    """Return the placement of a row-major array with this sharding."""
    # Only TPUs have another default layout, and JAX compiles a program for each transfer that names a layout.
    on_tpu = next(iter(sharding.device_set)).platform == "tpu"
    return Format(row_major.layout, sharding) if on_tpu else sharding


def quantized_as(source: TensorSource, decoder: Decoder, names: dict[Path, TensorName]) -> TensorSource:
    """Return the checkpoint, quantised while it is read if the model is quantised and the checkpoint is not.

    Raises:
        LaunchError: the checkpoint stores a weight transposed, which cannot be quantised while it is read.
    """
    quantization = decoder.config.quantization
    if quantization is None or any(name.endswith("_scale") for name in source.shapes if not _is_ignored(name)):
        return source
    wanted: set[str] = set()
    quantizer = Quantizer(np.dtype(np.uint8), quantization.block[1], np.dtype(np.float32))
    for path, spec in decoder.param_specs.items():
        if spec.packing is not None and path[-1] == "weight":
            if names[path].transposed:
                raise LaunchError(f"--quantization: {names[path].pattern} has inputs and outputs the other way round")
            wanted |= {name for name, *_ in _tensors_of(spec, names[path], 1)}
            scale_dtype = decoder.param_specs[*path[:-1], "scale"].dtype
            quantizer = Quantizer(spec.dtype, quantization.block[1], scale_dtype)
    return quantizing(source, wanted, quantizer)


def _dequantized_as(source: TensorSource, decoder: Decoder, names: dict[Path, TensorName]) -> TensorSource:
    """Return the checkpoint with those weights dequantised that it stores quantised and the model does not."""
    for quantization in {spec.stored for spec in decoder.param_specs.values()} - {None}:
        assert quantization is not None
        wanted = {
            name
            for path, spec in decoder.param_specs.items()
            if spec.stored == quantization
            for name, *_ in _tensors_of(spec, names[path], 1)
        }
        wanted = {name for name in wanted if f"{name}_scale" in source.shapes}
        if wanted:
            source = dequantizing(source, wanted, Dequantizer(quantization.element_type, quantization.block))
    return source


def restore_weights(folder: pathlib.Path, decoder: Decoder, mesh: Mesh) -> Weights:
    """Restore an Orbax folder directly into shards.

    Raises:
        CheckpointError: the folder does not hold this model.
    """

    def saved(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        rows, times = replicated_head_rows(spec, decoder.args)
        shape = (spec.shape[0], spec.shape[1] // times, *spec.shape[2:]) if rows else spec.shape
        # Heads that will be repeated are restored unsharded.
        axes = (None,) * len(shape) if rows else spec.axes
        return jax.ShapeDtypeStruct(shape, spec.dtype, sharding=named_sharding(axes, shape, mesh))

    abstract = tree_of((path, saved(spec)) for path, spec in _loaded(decoder).items())
    weights: Weights = orbax_io.restore(folder, abstract)
    for path, spec in _loaded(decoder).items():
        rows, times = replicated_head_rows(spec, decoder.args)
        node = functools.reduce(operator.getitem, path[:-1], weights)
        restored = repeat_heads(np.asarray(node[path[-1]]), 1, rows, times) if rows else node[path[-1]]
        row_major = weight_format(spec.axes, spec.shape, mesh)
        node[path[-1]] = jax.device_put(restored, _placement(row_major, named_sharding(spec.axes, spec.shape, mesh)))
    return weights


def _loaded(decoder: Decoder) -> dict[Path, ParamSpec]:
    """Return the weights that are stored in checkpoints."""
    return {path: spec for path, spec in decoder.param_specs.items() if spec.loaded}


class _ParamReader:
    """Reads any shard of one parameter."""

    def __init__(self, source: TensorSource, spec: ParamSpec, name: TensorName, heads: tuple[int, int]) -> None:
        self._source = source
        self._spec = spec
        self._name = name
        self._head_rows, self._replication = heads

    def read(self, index: Index) -> np.ndarray:
        """Read the part of the (stacked) parameter at `index`, in the parameter's dtype."""
        shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, self._spec.shape, strict=True))
        out = _aligned_empty(shape, self._spec.dtype)
        if not self._spec.stacked:
            self._read_into(out, self._name.pattern, index)
            return out
        for position, layer in enumerate(self._spec.layers[index[0]]):
            if self._spec.of_experts:
                self._read_experts(out[position], layer, index[1:])
            else:
                self._read_into(out[position], self._name.of_layer(layer), index[1:])
        return out

    def _read_experts(self, out: np.ndarray, layer: int, index: Index) -> None:
        """Read the weights of some experts of a layer, one after the other."""
        name, num_rows = self._name, self._spec.shape[2]
        start, stop, _ = index[1].indices(num_rows)
        rows = slice(name.first_row + start * name.row_step, name.first_row + stop * name.row_step, name.row_step)
        part = (*index[2:], rows) if name.transposed else (rows, *index[2:])
        for place, expert in enumerate(range(self._spec.shape[1])[index[0]]):
            if name.by_expert:
                values = self._read(name.of_layer(layer, expert), part)
            else:
                values = self._read(name.of_layer(layer), (slice(expert, expert + 1), *part))[0]
            out[place] = values.T if name.transposed else values

    def _read_into(self, out: np.ndarray, name: str, index: Index) -> None:
        """Read part of one tensor, a few rows at a time, as it usually has to be cast to another dtype."""
        first_row, num_rows = self._name.first_row, self._spec.shape[self._spec.stacked] // self._replication
        if self._replication > 1:
            whole = self._read(name, (slice(first_row, first_row + num_rows),))
            out[...] = repeat_heads(whole, 0, self._head_rows, self._replication)[index]
            return
        start_row, end_row, _ = index[0].indices(num_rows)
        step = max(1, _CHUNK_BYTES * len(out) // max(1, out.nbytes))
        for start in range(0, len(out), step):
            first = first_row + start_row + start
            part = slice(first, min(first + step, first_row + end_row))
            out[start : start + step] = self._read(name, (part, *index[1:]))

    def _read(self, name: str, index: Index) -> np.ndarray:
        values = self._source.read(name, index)
        # Other weights are cast to the dtype. Casting quantised ones would change their meaning, or round them.
        found, wanted = values.dtype, self._spec.dtype
        fits = found == wanted or (wanted.itemsize > 1 and np.can_cast(found, wanted))
        if self._spec.packing is not None and not fits:
            raise LaunchError(f"the checkpoint's {name} is {found}, the config says that it is {wanted}")
        return values


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate memory that a CPU device can alias; less aligned memory would be copied."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _names_of_blocks(decoder: Decoder, names: dict[Path, TensorName]) -> dict[Path, TensorName]:
    """Return the tensors of the scales and zero points of quantised weights; see `checkpoints.quantized`."""
    found: dict[Path, TensorName] = {}
    for path, spec in decoder.param_specs.items():
        if path[-1] in ("scale", "zero") and spec.packing is not None:
            weight, rows = names[*path[:-1], "weight"], spec.packing.block_rows
            cut = rows > 1 and (weight.first_row % rows or weight.row_step != 1)
            if weight.transposed or cut:
                raise LaunchError(f"{weight.pattern}: its parts do not start at the boundary of a quantised block")
            first_row = weight.first_row // rows
            found[path] = weight._replace(pattern=f"{weight.pattern}_{path[-1]}", first_row=first_row)
    return found


def _is_ignored(name: str) -> bool:
    return name.endswith(_IGNORED_SUFFIXES + _KV_SCALES)


def _check_tensors(source: TensorSource, decoder: Decoder, names: dict[Path, TensorName]) -> None:
    replication = decoder.args.parallelism.kv_head_replication
    wanted: dict[str, tuple[int, ...]] = {}
    for path, spec in _loaded(decoder).items():
        for name, shape, rows_axis in _tensors_of(spec, names[path], replication):
            # A tensor that stacks several weights has the sum of their rows.
            others = wanted[name][rows_axis] if name in wanted else 0
            wanted[name] = (*shape[:rows_axis], shape[rows_axis] + others, *shape[rows_axis + 1 :])
    found = dict(source.shapes)
    if decoder.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    first = decoder.config.num_layers
    for layer in range(first, first + decoder.config.num_mtp_layers):
        found = {name: shape for name, shape in found.items() if not name.startswith(f"model.layers.{layer}.")}
    problems = [f"missing: {name}" for name in wanted if name not in found]
    problems += [f"unknown: {name}" for name in found if name not in wanted and not _is_ignored(name)]
    problems += [
        f"wrong shape: {name} is {found[name]}, the config asks for {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if any(name.endswith(_KV_SCALES) for name in found):
        logger.info("the checkpoint's scales for an FP8 KV cache are not used")
    if problems:
        more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:_MAX_LISTED])
        raise LaunchError(f"the checkpoint's tensors do not fit its config ({len(problems)} problems):{listed}{more}")


def _tensors_of(spec: ParamSpec, name: TensorName, replication: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield (name, shape, axis of the rows) of each tensor that contains part of a weight."""
    shape = spec.shape[spec.stacked :]
    if "kv_heads" in spec.axes:
        shape = (shape[0] // replication, *shape[1:])
    if name.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    rows_axis = len(shape) - 1 if name.transposed else int(spec.of_experts)
    for layer in spec.layers or (0,):
        if not name.by_expert:
            yield name.of_layer(layer), shape, rows_axis
            continue
        for expert in range(shape[0]):
            yield name.of_layer(layer, expert), shape[1:], rows_axis - 1
