"""Adds the LoRA updates of a step to the results of a model's modules; see `jaxserve.layers.context`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.layers.context import ExpertAdapters
from jaxserve.layers.linear import Embedding
from jaxserve.models.param_spec import Path
from kernels_pallas.grouped_matmul.api import GroupedMatmul
from kernels_pallas.lora_matmul.api import LoraMatmul
from kernels_pallas.lora_matmul.xla.backend import HeadLora, TokenBlocks, XlaLora, lora_embed
from kernels_pallas.stacked import LoraPair, Stacked


class GroupSplit(NamedTuple):
    """Which axes of a group's modules are split over the devices of a replica.

    Attributes:
        inputs: whether the inputs are split.
        outputs: whether the outputs are split, by name of the module.
    """

    inputs: bool
    outputs: Mapping[str, bool]


class LoraOps(NamedTuple):
    """The kernels for LoRA updates, and the sharding of the matrices.

    Attributes:
        matmul: the kernels.
        by_kernel: paths of the pool's groups that use them; the others use portable XLA.
        experts: the grouped matmul for LoRA matrices of experts.
        num_adapters: number of slots of the pool, without slot 0.
        splits: how modules are split over the mesh, by path of their group.
    """

    matmul: LoraMatmul
    by_kernel: Collection[Path]
    experts: GroupedMatmul
    num_adapters: int
    splits: Mapping[Path, GroupSplit]


class LoraPlan(NamedTuple):
    """Metadata derived from the slots of the tokens.

    Attributes:
        slot_T: i32, the slot of each token.
        kernel: the kernels' metadata.
        portable: portable XLA's metadata.
    """

    slot_T: jax.Array
    kernel: Any
    portable: TokenBlocks


class _Group:
    """The updates of a group's modules; see `LoraGroup`.

    Args:
        ops: the kernels.
        path: path of the group in the pool.
        part: the group's matrices: `a`, and `b` by name of the module, each `Stacked`.
        plan: metadata of the tokens.
    """

    def __init__(self, ops: LoraOps, path: Path, part: Mapping[str, Any], plan: LoraPlan) -> None:
        by_kernel = path in ops.by_kernel
        self._matmul: LoraMatmul = ops.matmul if by_kernel else XlaLora()
        self._plan: Any = plan.kernel if by_kernel else plan.portable
        self._split = ops.splits[path]
        self._a: Stacked = part["a"]
        self._b: Mapping[str, Stacked] = part["b"]
        self._members = sorted(self._b)
        self._h: Any = None

    def update(self, module: Path, x_TI: jax.Array) -> jax.Array | None:
        """See `LoraGroup`. The first adapted module computes x A^T for all modules of the group."""
        name = module[-1]
        if name not in self._b:
            return None
        if self._h is None:
            self._h = self._matmul.shrink(x_TI, self._a, self._plan, split=self._split.inputs)
        index, split = self._members.index(name), self._split.outputs[name]
        return self._matmul.expand(self._h, self._b[name], self._plan, member=index, split=split)


class _Layer(NamedTuple):
    """The adapters of one layer; see `LoraLayer`.

    Attributes:
        ops: the kernels.
        matrices: the layer's part of the pool.
        plan: metadata of the layer's tokens.
    """

    ops: LoraOps
    matrices: Mapping[str, Any]
    plan: LoraPlan

    @property
    def experts(self) -> ExpertAdapters | None:
        """See `LoraLayer`."""
        return ExpertAdapters(self.ops.experts, self.ops.num_adapters, self.plan.slot_T)

    def group(self, modules: Sequence[Path]) -> _Group | None:
        """See `LoraLayer`."""
        found = self._find(modules)
        return None if found is None else _Group(self.ops, *found, self.plan)

    def heads(self, module: Path, key_dim: int, num_heads: int) -> HeadLora | None:
        """See `LoraLayer`."""
        pair = self.expert_pair(module)
        return None if pair is None else HeadLora(pair, self.plan.portable, key_dim, num_heads)

    def expert_pair(self, module: Path) -> LoraPair | None:
        """See `LoraLayer`."""
        found = self._find((module,))
        return None if found is None else LoraPair(found[1]["a"], found[1]["b"][module[-1]])

    def _find(self, modules: Sequence[Path]) -> tuple[Path, Mapping[str, Any]] | None:
        """Return the pool's node of modules with the same inputs; it is named after the first adapted one."""
        node: Any = self.matrices
        for name in modules[0][1:-1]:
            node = node.get(name, {})
        names = {module[-1] for module in modules}
        for name in sorted(names & node.keys()):
            return (*modules[0][:-1], name), node[name]
        return None


class Adapters(NamedTuple):
    """The adapters of a step; see `StepLora`.

    Attributes:
        pool: see `jaxserve.lora.pool`; empty in steps without adapters.
        slot_T: i32, the slot of each token; 0 for none.
        ops: the kernels.
    """

    pool: Mapping[str, Any]
    slot_T: jax.Array
    ops: LoraOps

    @property
    def layers(self) -> dict[str, Any]:
        """See `StepLora`."""
        return self.pool.get("layers", {})

    def slots_of(self, num_tokens: int) -> jax.Array:
        """See `StepLora`."""
        assert self.slot_T.shape == (num_tokens,)
        return self.slot_T

    def plan(self, slot_T: jax.Array) -> LoraPlan:
        """See `StepLora`."""
        num_adapters = self.ops.num_adapters
        return LoraPlan(slot_T, self.ops.matmul.plan(slot_T, num_adapters), XlaLora().plan(slot_T, num_adapters))

    def embed(self, embedding: Embedding, token_ids_T: jax.Array) -> jax.Array:
        """See `StepLora`."""
        x_TD = embedding(token_ids_T)
        if (part := self.pool.get("embed")) is None:
            return x_TD
        update_TD = lora_embed(token_ids_T, part["a"], part["b"]["embed"], self.slot_T)
        return x_TD + update_TD.astype(x_TD.dtype)

    def layer(self, matrices: dict[str, Any], plan: LoraPlan) -> _Layer:
        """See `StepLora`."""
        return _Layer(self.ops, matrices, plan)

    def add_to_logits(self, logits_BV: jax.Array, x_BD: jax.Array, plan: LoraPlan) -> jax.Array:
        """See `StepLora`. The head may be tied to the embedding."""
        if (part := self.pool.get("lm_head")) is None:
            return logits_BV
        part = jax.tree.map(lambda matrices: Stacked(matrices[None], jnp.int32(0)), part)
        update_BV = _Group(self.ops, ("lm_head",), part, plan).update(("lm_head",), x_BD)
        assert update_BV is not None
        return logits_BV + update_BV.astype(logits_BV.dtype)
