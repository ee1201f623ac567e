"""An adapter as a delta to the model's weights: the base tree's own paths, a pair of factors at each.

Dimension key: L layers, R rank, I inputs, O outputs of a weight [O, I]; V ids, D hidden for embeddings.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.adapters import AdapterTensors, PeftAdapter
from checkpoints.source import listed
from jaxserve.config import ModelConfig
from jaxserve.errors import AdapterError
from jaxserve.models.decoder import Decoder, ParamSpec, Path, Weights, tree_of
from jaxserve.models.kv_heads import kv_head_rows, repeat_heads
from jaxserve.models.tensor_name import TensorName

# What a tied model lacks: its head is the embedding. An adapter may treat the two differently.
_HEAD = ("lm_head", "weight")
EMBEDDING = ("embed", "weight")


class LowRank(NamedTuple):
    """delta W = scale * B A. Weights that have layers along axis 0 have them here, too, zeros where there is none.

    Attributes:
        a: f32[(L,) R, I].
        b: f32[(L,) O, R].
        scale: f32[(L)].
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray


class AdapterDelta(NamedTuple):
    """An adapter for one model.

    Attributes:
        factors: by path in the model's tree.
        rank: of the widest factor; the others are filled up with zeros.
        tied_head: the model's head is its embedding.
    """

    factors: dict[Path, LowRank]
    rank: int
    tied_head: bool

    @property
    def num_bytes(self) -> int:
        """Of the factors on the host."""
        return sum(array.nbytes for factor in self.factors.values() for array in factor)


class _Target(NamedTuple):
    """Where a module's factors belong."""

    path: Path
    place: int | None
    first_row: int


def make_delta(
    adapter: PeftAdapter, decoder: Decoder, names: Mapping[Path, TensorName], checkpoint: ModelConfig
) -> AdapterDelta:
    """Fit an adapter to a model.

    Args:
        adapter: as its files have it.
        decoder: the model; its key/value heads may be a multiple of the checkpoint's.
        names: path in the tree -> where the checkpoint has it.
        checkpoint: the model as its maker describes it.

    Raises:
        AdapterError: modules that the model has not, or of another shape; all are listed.
    """
    specs = adaptable(decoder)
    targets = _targets(specs, names)
    copies = decoder.config.num_kv_heads // checkpoint.num_kv_heads
    rank = adapter.rank
    factors: dict[Path, LowRank] = {}
    problems: list[str] = []
    for module, tensors in adapter.modules.items():
        if module not in targets:
            problems.append(f"{module}: the model has no such module, or none that adapters can change")
            continue
        heads = [kv_head_rows(specs[target.path], checkpoint, copies) for target in targets[module]]
        rows = [
            specs[target.path].shape[-2] // times for target, (_, times) in zip(targets[module], heads, strict=True)
        ]
        made_for, wanted = (
            (len(tensors.b_OR), tensors.a_RI.shape[1]),
            (sum(rows), specs[targets[module][0].path].num_inputs),
        )
        if made_for != wanted:
            problems.append(f"{module}: made for a weight of {made_for}, not {wanted}")
            continue
        for target, own_rows, (head_rows, times) in zip(targets[module], rows, heads, strict=True):
            b_OR = tensors.b_OR[target.first_row : target.first_row + own_rows]
            b_OR = repeat_heads(b_OR, 0, head_rows, times) if times > 1 else b_OR
            _put(factors, target, specs[target.path], tensors._replace(b_OR=b_OR), rank)
    if problems:
        raise AdapterError(f"the adapter does not fit the model: {listed(problems)}")
    return AdapterDelta(factors, rank, decoder.config.tie_word_embeddings)


def module_name(path: Path, names: Mapping[Path, TensorName]) -> str:
    """The module of a weight as checkpoints name it; a tied head has no weight of its own."""
    return names[path].pattern.removesuffix(".weight") if path in names else _HEAD[0]


def adaptable(decoder: Decoder) -> dict[Path, ParamSpec]:
    """The weights that an adapter can change: matrices, and the head also where it is the embedding."""
    specs = {path: spec for path, spec in decoder.param_specs.items() if _is_linear(path, spec)}
    return {_HEAD: specs[EMBEDDING], **specs}


def _is_linear(path: Path, spec: ParamSpec) -> bool:
    return path[-1] == "weight" and spec.adaptable and len(spec.shape) - spec.stacked == 2


def _targets(specs: Mapping[Path, ParamSpec], names: Mapping[Path, TensorName]) -> dict[str, list[_Target]]:
    """The weights of each module; those of a fused one by their rows."""
    targets: dict[str, list[_Target]] = {}
    for path, spec in specs.items():
        module, first_row = module_name(path, names), names[path].first_row if path in names else 0
        for place, layer in enumerate(spec.layers or (None,)):
            target = _Target(path, None if layer is None else place, first_row)
            targets.setdefault(module.format(layer=layer), []).append(target)
    return targets


def _put(factors: dict[Path, LowRank], target: _Target, spec: ParamSpec, tensors: AdapterTensors, rank: int) -> None:
    *lead, outputs, _ = spec.shape
    inputs = spec.num_inputs
    if target.path not in factors:
        zeros = [np.zeros((*lead, *shape), np.float32) for shape in ((rank, inputs), (outputs, rank), ())]
        factors[target.path] = LowRank(*zeros)
    factor, own = factors[target.path], tensors.a_RI.shape[0]
    at = () if target.place is None else (target.place,)
    factor.a[(*at, slice(own))] = tensors.a_RI
    factor.b[(*at, slice(None), slice(own))] = tensors.b_OR
    factor.scale[at] = tensors.scale


def merge(weights: Weights, delta: AdapterDelta, add: Callable[[jax.Array, LowRank], jax.Array]) -> Weights:
    """The weights with an adapter in them; leaves that it does not change stay what they are.

    Args:
        weights: of the base.
        delta: of the adapter.
        add: `add_low_rank`, compiled or not.

    Raises:
        AdapterError: the weights are quantised, or the embedding is the head as well, and the adapter changes one only.
    """
    if delta.tied_head and not delta.factors.keys().isdisjoint({_HEAD, EMBEDDING}):
        raise AdapterError(
            "the model's head is its embedding, and the adapter changes one of them: it can be served, not merged"
        )
    if any(leaf.dtype.itemsize == 1 for leaf in jax.tree.leaves(weights)):
        raise AdapterError("the model's weights are quantised: an adapter can be served with them, not merged")
    changes = tree_of(delta.factors.items())

    def walk(base: Any, change: Any) -> Any:
        if isinstance(change, LowRank):
            return add(base, change)
        return {name: walk(leaf, change[name]) if name in change else leaf for name, leaf in base.items()}

    return walk(weights, changes)


def add_low_rank(base: jax.Array, factor: LowRank) -> jax.Array:
    """Base + scale * B A in f32, rounded once to the dtype of the base; one layer at a time."""
    if base.ndim == 2:
        return _add(base, *factor)

    def body(layer: jax.Array, base: jax.Array) -> jax.Array:
        a, b, scale = (jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) for array in map(jnp.asarray, factor))
        return base.at[layer].set(_add(base[layer], a, b, scale))

    return jax.lax.fori_loop(0, base.shape[0], body, base)


def _add(base_OI: jax.Array, a_RI: Any, b_OR: Any, scale: Any) -> jax.Array:
    delta_OI = jnp.einsum("or,ri->oi", b_OR * scale, a_RI, precision=jax.lax.Precision.HIGHEST)
    return (base_OI.astype(jnp.float32) + delta_OI).astype(base_OI.dtype)


def split(weights: Weights, delta: AdapterDelta, add: Callable[[jax.Array, LowRank], jax.Array]) -> Weights:
    """The inverse of `merge`, but for rounding."""
    taken = {path: factor._replace(scale=-factor.scale) for path, factor in delta.factors.items()}
    return merge(weights, delta._replace(factors=taken), add)
