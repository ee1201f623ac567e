"""Adds what adapters change to a model's modules while a step is traced."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.layers.linear import Embedding
from jaxserve.layers.mla import Expansion
from jaxserve.layers.moe import ExpertAdapters, ExpertLinear, ExpertLoraPair, Experts
from kernels_pallas.grouped_matmul.api import GroupedMatmul
from kernels_pallas.grouped_matmul.xla.backend import XlaGroupedMatmul
from kernels_pallas.lora_matmul.api import Factors, LoraMatmul
from kernels_pallas.lora_matmul.xla.backend import HeadLora, TokenBlocks, XlaLora, lora_embed

M = TypeVar("M", bound=nnx.Module)


class GroupSplit(NamedTuple):
    """Which axes of a group's modules are split over the devices of a copy.

    Attributes:
        inputs: theirs.
        outputs: of each module by its name.
    """

    inputs: bool
    outputs: Mapping[str, bool]


class LoraOps(NamedTuple):
    """How updates are computed.

    Attributes:
        matmul: the kernels.
        by_kernel: paths of the groups that they take; others are portable XLA's.
        experts: multiplies with the factors of experts.
        num_adapters: that the bank has room for.
        splits: how modules lie on the mesh, by the path of their group.
    """

    matmul: LoraMatmul
    by_kernel: Collection[tuple[str, ...]]
    experts: GroupedMatmul
    num_adapters: int
    splits: Mapping[tuple[str, ...], GroupSplit]


class TokenSlots(NamedTuple):
    """What the tokens' slots decide.

    Attributes:
        slot_T: i32.
        kernel: the kernels' plan.
        portable: of portable XLA.
    """

    slot_T: jax.Array
    kernel: Any
    portable: TokenBlocks


class _Updates:
    """Of a group's modules.

    Args:
        maths: how they are computed.
        part: the group's factors.
        path: of the group.
        slots: of the tokens.
    """

    def __init__(self, maths: LoraOps, part: Mapping[str, Any], path: tuple[str, ...], slots: TokenSlots) -> None:
        self._matmul, self._plan = (
            (maths.matmul, slots.kernel) if path in maths.by_kernel else (XlaLora(), slots.portable)
        )
        self._split = maths.splits[path]
        self._a = Factors(*part["a"])
        self._b = {member: Factors(*factors) for member, factors in part["b"].items()}
        self._members = sorted(self._b)
        self._x_TI: jax.Array | None = None
        self._h: Any = None

    def __call__(self, member: str, x_TI: jax.Array) -> jax.Array:
        """What each token's adapter adds to a module's results, [T, O]."""
        if x_TI is not self._x_TI:  # else the module before has multiplied them
            self._h = self._matmul.shrink(x_TI, self._a, self._plan, split=self._split.inputs)
            self._x_TI = x_TI
        index, split = self._members.index(member), self._split.outputs[member]
        return self._matmul.expand(self._h, self._b[member], self._plan, member=index, split=split)


class Adapters(NamedTuple):
    """The adapters of a step.

    Attributes:
        bank: see `jaxserve.lora.pool`; empty where no row has one.
        slot_T: i32, of each token; 0 for none.
        maths: how they are applied.
    """

    bank: Mapping[str, Any]
    slot_T: jax.Array | None
    maths: LoraOps

    def slots_of(self, num_tokens: int) -> jax.Array:
        """i32[T]."""
        return jnp.zeros(num_tokens, jnp.int32) if self.slot_T is None else self.slot_T

    def plan(self, slot_T: jax.Array) -> TokenSlots | None:
        """What the layers need to know of these tokens' slots."""
        if not self.bank:
            return None
        num_adapters = self.maths.num_adapters
        return TokenSlots(slot_T, self.maths.matmul.plan(slot_T, num_adapters), XlaLora().plan(slot_T, num_adapters))

    def embed(self, embedding: Embedding, token_ids_T: jax.Array) -> jax.Array:
        """Rows of an embedding and of what adapters add to it."""
        x_TD = embedding(token_ids_T)
        if (part := self.bank.get("embed")) is None:
            return x_TD
        update_TD = lora_embed(token_ids_T, part["a"], part["b"]["embed"], self.slots_of(token_ids_T.shape[0]))
        return x_TD + update_TD.astype(x_TD.dtype)

    def attach(self, module: M, bank: Mapping[str, Any], slots: TokenSlots, path: tuple[str, ...]) -> M:
        """Give the linear modules that the bank names the updates of each token's own adapter.

        Args:
            module: at `path` of the model.
            bank: the part of it at that path, each leaf with the place of the layer in it.
            slots: of the tokens.
            path: of the module.
        """
        if isinstance(module, Experts) and bank:
            module.adapters = ExpertAdapters(self.maths.experts, self.maths.num_adapters, slots.slot_T)
        for name, part in bank.items():
            if "a" not in part:
                self.attach(getattr(module, name), part, slots, (*path, name))
                continue
            updates = _Updates(self.maths, part, (*path, name), slots)
            for member, (b, place) in part["b"].items():
                target = getattr(module, member)
                if isinstance(target, ExpertLinear):
                    target.update = ExpertLoraPair(part["a"][0], b, place)
                elif isinstance(target, Expansion):
                    factors = (Factors(*part["a"]), Factors(b, place))
                    target.head_updates = HeadLora(*factors, slots.portable, target.key_dim, target.num_heads)
                else:
                    target.update = partial(updates, member)
        return module

    def add_to_logits(self, logits_BV: jax.Array, x_BD: jax.Array, slots: TokenSlots) -> jax.Array:
        """What adapters make of the head, which may be the embedding."""
        if (part := self.bank.get("lm_head")) is None:
            return logits_BV
        part = jax.tree.map(lambda leaf: (leaf[None], jnp.int32(0)), part)
        updates = _Updates(self.maths, part, ("lm_head",), slots)
        return logits_BV + updates("lm_head", x_BD).astype(logits_BV.dtype)


NO_ADAPTERS = Adapters({}, None, LoraOps(XlaLora(), (), XlaGroupedMatmul(), 0, {}))
