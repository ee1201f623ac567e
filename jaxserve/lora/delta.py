"""An adapter as a delta to the model's weights: LoRA A and B matrices by path in the base tree.

Dimension key: L layers, E experts, R rank, I inputs, O outputs of a weight [O, I]; V ids, D hidden for embeddings.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.adapters import AdapterTensors, PeftAdapter
from checkpoints.source import listed
from jaxserve.errors import AdapterError
from jaxserve.loading.kv_heads import repeat_heads, replicated_head_rows
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.param_spec import ParamSpec, Path, Weights, tree_of

# A tied model has no such weight, since its head is the embedding. An adapter may still treat the two differently.
_HEAD = ("lm_head", "weight")
EMBEDDING = ("embed", "weight")
# transformers 5 renames modules of older checkpoints, and fuses experts that those store one by one. An adapter may use
# either set of names.
_RENAMED = (".block_sparse_moe.", ".mlp.")
_ALL_EXPERTS = "model.layers.{layer}.mlp.experts."
_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


class LoraWeights(NamedTuple):
    """The update of a weight: delta W = scale * B A.

    The leading layer and expert axes are those of the weight; layers and experts without an update hold zeros.

    Attributes:
        a: f32[(L,) (E,) R, I].
        b: f32[(L,) (E,) O, R].
        scale: f32[(L,) (E)].
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray


class AdapterDelta(NamedTuple):
    """An adapter for one model.

    Attributes:
        weights: updates by path in the model's tree.
        rank: the largest rank; matrices of lower rank are padded with zeros.
        tied_head: whether the model's head is its embedding.
    """

    weights: dict[Path, LoraWeights]
    rank: int
    tied_head: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the A and B matrices and scales on the host."""
        return sum(array.nbytes for lora in self.weights.values() for array in lora)


class _Target(NamedTuple):
    """The weight that a module's LoRA matrices update.

    Attributes:
        path: path of the weight.
        at: indices of the layer and the expert in the weight; omitted for an axis that is absent or updated whole.
        first_row, row_step: first row of the weight in the module, and the step to its next row.
    """

    path: Path
    at: tuple[int, ...]
    first_row: int = 0
    row_step: int = 1


class _TargetTensors(NamedTuple):
    """LoRA matrices for a target."""

    target: _Target
    tensors: AdapterTensors


def make_delta(adapter: PeftAdapter, decoder: Decoder, names: Mapping[Path, TensorName]) -> AdapterDelta:
    """Fit an adapter to a model.

    Args:
        adapter: the adapter as read from its files.
        decoder: the model.
        names: the tensor in the checkpoint of each weight, by path in the tree.

    Raises:
        AdapterError: the adapter has modules that the model lacks or has in another shape; the message lists them.
    """
    specs = adaptable(decoder)
    targets = _targets(specs, names)
    target_tensors: list[_TargetTensors] = []
    problems: list[str] = []
    for module, tensors in adapter.modules.items():
        if module not in targets:
            problems.append(f"{module}: not a module of the model that adapters can change")
            continue
        heads = [replicated_head_rows(specs[target.path], decoder.args) for target in targets[module]]
        rows = [
            specs[target.path].shape[-2] // times for target, (_, times) in zip(targets[module], heads, strict=True)
        ]
        spec, first = specs[targets[module][0].path], targets[module][0]
        experts = spec.shape[len(first.at) : -2]  # the expert axis, if the module contains all experts
        made_for = (*tensors.a_RI.shape[:-2], tensors.b_OR.shape[-2], tensors.a_RI.shape[-1])
        wanted = (*experts, sum(rows), spec.num_inputs)
        if made_for != wanted:
            problems.append(f"{module}: expects a weight of shape {made_for}, the model has {wanted}")
            continue
        for target, own_rows, (head_rows, times) in zip(targets[module], rows, heads, strict=True):
            b_OR = tensors.b_OR[..., target.first_row :: target.row_step, :][..., :own_rows, :]
            b_OR = repeat_heads(b_OR, 0, head_rows, times) if times > 1 else b_OR
            own = tensors._replace(b_OR=b_OR)
            target_tensors.append(
                _TargetTensors(target, own if len(targets[module]) == 1 else _without_idle_ranks(own))
            )
    if problems:
        raise AdapterError(f"the adapter does not fit the model: {listed(problems)}")
    rank = max(item.tensors.a_RI.shape[-2] for item in target_tensors)
    weights: dict[Path, LoraWeights] = {}
    for target, tensors in target_tensors:
        _put(weights, target, specs[target.path], tensors, rank)
    return AdapterDelta(weights, rank, decoder.config.tie_word_embeddings)


def _without_idle_ranks(tensors: AdapterTensors) -> AdapterTensors:
    """Drop ranks whose columns of B are zero: PEFT concatenates the ranks of gate and up projections."""
    used_R = tensors.b_OR.any(axis=tuple(range(tensors.b_OR.ndim - 1)))
    used_R[0] |= not used_R.any()
    return tensors._replace(a_RI=tensors.a_RI[..., used_R, :], b_OR=tensors.b_OR[..., used_R])


def module_name(path: Path, names: Mapping[Path, TensorName]) -> str:
    """Return the name of a weight's module in checkpoints; a tied head, which they do not store, is `lm_head`."""
    return names[path].pattern.removesuffix(".weight") if path in names else _HEAD[0]


def adaptable(decoder: Decoder) -> dict[Path, ParamSpec]:
    """Return the weights that an adapter can change: all matrices, and the head even if it is the embedding."""
    specs = {path: spec for path, spec in decoder.param_specs.items() if _is_linear(path, spec)}
    return {_HEAD: specs[EMBEDDING], **specs}


def _is_linear(path: Path, spec: ParamSpec) -> bool:
    return path[-1] == "weight" and len(spec.shape) - spec.stacked - spec.of_experts == 2


def _targets(specs: Mapping[Path, ParamSpec], names: Mapping[Path, TensorName]) -> dict[str, list[_Target]]:
    """Return the weights of each module, by its name; a fused module has several, in different rows."""
    targets: dict[str, list[_Target]] = {}
    for path, spec in specs.items():
        name, module = names.get(path), module_name(path, names)
        rows = (0, 1) if name is None else (name.first_row, name.row_step)
        experts = range(spec.shape[1]) if name is not None and name.by_expert else (None,)
        for place, layer in enumerate(spec.layers or (None,)):
            at = () if layer is None else (place,)
            for expert in experts:
                target = _Target(path, at if expert is None else (*at, expert), *rows)
                own = module.format(layer=layer, expert=expert)
                for known in dict.fromkeys((own, own.replace(*_RENAMED))):
                    targets.setdefault(known, []).append(target)
            if name is not None and name.by_expert:
                # Rows of the gate projection come before those of the up projection.
                first_row = spec.shape[-2] if path[-2] == "up_proj" else 0
                fused = _ALL_EXPERTS.format(layer=layer) + _FUSED.get(path[-2], path[-2])
                targets.setdefault(fused, []).append(_Target(path, at, first_row))
    return targets


def _put(
    weights: dict[Path, LoraWeights], target: _Target, spec: ParamSpec, tensors: AdapterTensors, rank: int
) -> None:
    *lead, outputs, _ = spec.shape
    inputs = spec.num_inputs
    if target.path not in weights:
        zeros = [np.zeros((*lead, *shape), np.float32) for shape in ((rank, inputs), (outputs, rank), ())]
        weights[target.path] = LoraWeights(*zeros)
    lora, own_rank = weights[target.path], tensors.a_RI.shape[-2]
    lora.a[target.at][..., :own_rank, :] = tensors.a_RI
    lora.b[target.at][..., :own_rank] = tensors.b_OR
    lora.scale[target.at] = tensors.scale


def merge(weights: Weights, delta: AdapterDelta, add: Callable[[jax.Array, LoraWeights], jax.Array]) -> Weights:
    """Return the weights with an adapter merged; leaves that it does not change are returned as they are.

    Args:
        weights: weights of the base.
        delta: the adapter.
        add: `add_lora`, compiled or not.

    Raises:
        AdapterError: the weights are quantised, or the head is tied and the adapter changes it or the embedding.
    """
    if delta.tied_head and not delta.weights.keys().isdisjoint({_HEAD, EMBEDDING}):
        raise AdapterError(
            "the model's head is its embedding, and the adapter changes one of them: it can be served, not merged"
        )
    if any(leaf.dtype.itemsize == 1 for leaf in jax.tree.leaves(weights)):
        raise AdapterError("the model's weights are quantised: an adapter can be served with them, not merged")
    changes = tree_of(delta.weights.items())

    def walk(base: Any, change: Any) -> Any:
        if isinstance(change, LoraWeights):
            return add(base, change)
        return {name: walk(leaf, change[name]) if name in change else leaf for name, leaf in base.items()}

    return walk(weights, changes)


def add_lora(base: jax.Array, lora: LoraWeights) -> jax.Array:
    """Return base + scale * B A, in f32 for one layer and expert at a time, and rounded once to the base's dtype."""
    if base.ndim == 2:
        return _add(base, *lora)

    def body(index: jax.Array, base: jax.Array) -> jax.Array:
        of_index = (jax.lax.dynamic_index_in_dim(array, index, keepdims=False) for array in map(jnp.asarray, lora))
        return base.at[index].set(add_lora(base[index], LoraWeights(*of_index)))

    return jax.lax.fori_loop(0, base.shape[0], body, base)


def _add(base_OI: jax.Array, a_RI: Any, b_OR: Any, scale: Any) -> jax.Array:
    delta_OI = jnp.einsum("or,ri->oi", b_OR * scale, a_RI, precision=jax.lax.Precision.HIGHEST)
    return (base_OI.astype(jnp.float32) + delta_OI).astype(base_OI.dtype)


def split(weights: Weights, delta: AdapterDelta, add: Callable[[jax.Array, LoraWeights], jax.Array]) -> Weights:
    """Undo `merge`, up to rounding."""
    negated = {path: lora._replace(scale=-lora.scale) for path, lora in delta.weights.items()}
    return merge(weights, delta._replace(weights=negated), add)
