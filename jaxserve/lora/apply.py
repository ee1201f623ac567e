"""Adds what adapters change to a model's modules while a step is traced."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.layers import Embedding
from kernels_pallas.lora_matmul.api import LoraMatmul, Split
from kernels_pallas.lora_matmul.xla import lora_embed, lora_matmul

M = TypeVar("M", bound=nnx.Module)


class LoraMaths(NamedTuple):
    """How updates are computed.

    Attributes:
        matmul: the kernel.
        splits: how modules lie on the mesh, by their paths.
    """

    matmul: LoraMatmul
    splits: Mapping[tuple[str, ...], Split]

    def update(self, path: tuple[str, ...], part: Mapping[str, jax.Array], x_TI: jax.Array, slot_T: jax.Array) -> Any:
        """What each token's adapter adds to a module's results, [T, O]; `part` has the module's factors."""
        return self.matmul(x_TI, part["a"], part["b"], slot_T, self.splits[path])


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

    def embed(self, embedding: Embedding, token_ids_T: jax.Array) -> jax.Array:
        """Rows of an embedding and of what adapters add to it."""
        x_TD = embedding(token_ids_T)
        if (part := self.bank.get("embed")) is None:
            return x_TD
        update_TD = lora_embed(token_ids_T, part["a"], part["b"], self.slots_of(token_ids_T.shape[0]))
        return x_TD + update_TD.astype(x_TD.dtype)

    def attach(self, module: M, bank: Mapping[str, Any], slot_T: jax.Array, path: tuple[str, ...]) -> M:
        """Give the linear modules that the bank names the updates of each token's own adapter.

        Args:
            module: at `path` of the model.
            bank: the part of it at that path.
            slot_T: i32, of each token.
            path: of the module.
        """
        for name, part in bank.items():
            child, child_path = getattr(module, name), (*path, name)
            if "a" in part:
                child.update = lambda x_TI, part=part, path=child_path: self.maths.update(path, part, x_TI, slot_T)
            else:
                self.attach(child, part, slot_T, child_path)
        return module

    def add_to_logits(self, logits_BV: jax.Array, x_BD: jax.Array, slot_B: jax.Array) -> jax.Array:
        """What adapters make of the head, which may be the embedding."""
        if (part := self.bank.get("lm_head")) is None:
            return logits_BV
        return logits_BV + self.maths.update(("lm_head",), part, x_BD, slot_B).astype(logits_BV.dtype)


NO_ADAPTERS = Adapters({}, None, LoraMaths(lora_matmul, {}))
