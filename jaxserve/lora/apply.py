"""Adds what adapters change to a model's modules while a step is traced."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.layers import Embedding
from kernels_pallas.lora_matmul.api import LoraMatmul
from kernels_pallas.lora_matmul.xla import XlaLora, lora_embed

M = TypeVar("M", bound=nnx.Module)


class GroupSplit(NamedTuple):
    """Which axes of a group's modules are split over the devices of a copy.

    Attributes:
        inputs: theirs.
        outputs: of each module by its name.
    """

    inputs: bool
    outputs: Mapping[str, bool]


class LoraMaths(NamedTuple):
    """How updates are computed.

    Attributes:
        matmul: the kernels.
        num_adapters: that the bank has room for.
        splits: how modules lie on the mesh, by the path of their group.
    """

    matmul: LoraMatmul
    num_adapters: int
    splits: Mapping[tuple[str, ...], GroupSplit]


class _Updates:
    """Of a group's modules.

    Args:
        maths: how they are computed.
        part: the group's factors.
        path: of the group.
        plan: of the tokens' slots.
    """

    def __init__(self, maths: LoraMaths, part: Mapping[str, Any], path: tuple[str, ...], plan: Any) -> None:
        self._matmul, self._split = maths.matmul, maths.splits[path]
        self._part, self._plan = part, plan
        self._members = sorted(part["b"])
        self._x_TI: jax.Array | None = None
        self._h: Any = None

    def __call__(self, member: str, x_TI: jax.Array) -> jax.Array:
        """What each token's adapter adds to a module's results, [T, O]."""
        if x_TI is not self._x_TI:  # else the module before has multiplied them
            self._h = self._matmul.shrink(x_TI, self._part["a"], self._plan, split=self._split.inputs)
            self._x_TI = x_TI
        index, split = self._members.index(member), self._split.outputs[member]
        return self._matmul.expand(self._h, self._part["b"][member], self._plan, member=index, split=split)


class Adapters(NamedTuple):
    """The adapters of a step.

    Attributes:
        bank: see `jaxserve.lora.bank`; empty where no row has one.
        slot_T: i32, of each token; 0 for none.
        maths: how they are applied.
    """

    bank: Mapping[str, Any]
    slot_T: jax.Array | None
    maths: LoraMaths

    def slots_of(self, num_tokens: int) -> jax.Array:
        """i32[T]."""
        return jnp.zeros(num_tokens, jnp.int32) if self.slot_T is None else self.slot_T

    def plan(self, slot_T: jax.Array) -> Any:
        """What the layers need to know of these tokens' slots."""
        return self.maths.matmul.plan(slot_T, self.maths.num_adapters) if self.bank else None

    def embed(self, embedding: Embedding, token_ids_T: jax.Array) -> jax.Array:
        """Rows of an embedding and of what adapters add to it."""
        x_TD = embedding(token_ids_T)
        if (part := self.bank.get("embed")) is None:
            return x_TD
        update_TD = lora_embed(token_ids_T, part["a"], part["b"]["embed"], self.slots_of(token_ids_T.shape[0]))
        return x_TD + update_TD.astype(x_TD.dtype)

    def attach(self, module: M, bank: Mapping[str, Any], plan: Any, path: tuple[str, ...]) -> M:
        """Give the linear modules that the bank names the updates of each token's own adapter.

        Args:
            module: at `path` of the model.
            bank: the part of it at that path.
            plan: of the tokens' slots.
            path: of the module.
        """
        for name, part in bank.items():
            if "a" in part:
                updates = _Updates(self.maths, part, (*path, name), plan)
                for member in part["b"]:
                    getattr(module, member).update = partial(updates, member)
            else:
                self.attach(getattr(module, name), part, plan, (*path, name))
        return module

    def add_to_logits(self, logits_BV: jax.Array, x_BD: jax.Array, plan: Any) -> jax.Array:
        """What adapters make of the head, which may be the embedding."""
        if (part := self.bank.get("lm_head")) is None:
            return logits_BV
        updates = _Updates(self.maths, part, ("lm_head",), plan)
        return logits_BV + updates("lm_head", x_BD).astype(logits_BV.dtype)


NO_ADAPTERS = Adapters({}, None, LoraMaths(XlaLora(), 0, {}))
