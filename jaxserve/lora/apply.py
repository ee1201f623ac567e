"""Adds what adapters change to a model's modules while a step is traced."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.layers import Embedding
from kernels_pallas.lora_matmul.xla import lora_embed, lora_matmul

M = TypeVar("M", bound=nnx.Module)


class Adapters(NamedTuple):
    """The adapters of a step.

    Attributes:
        bank: see `jaxserve.lora.bank`; empty where no row has one.
        slot_T: i32, of each token; 0 for none.
    """

    bank: Mapping[str, Any]
    slot_T: jax.Array | None

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

    def add_to_logits(self, logits_BV: jax.Array, x_BD: jax.Array, slot_B: jax.Array) -> jax.Array:
        """What adapters make of the head, which may be the embedding."""
        if (part := self.bank.get("lm_head")) is None:
            return logits_BV
        return logits_BV + lora_matmul(x_BD, part["a"], part["b"], slot_B)


NO_ADAPTERS = Adapters({}, None)


def attach(module: M, bank: Mapping[str, Any], slot_T: jax.Array) -> M:
    """Give the linear modules that the bank names the updates of each token's own adapter."""
    for name, part in bank.items():
        child = getattr(module, name)
        if "a" in part:
            child.update = lambda x_TI, part=part: lora_matmul(x_TI, part["a"], part["b"], slot_T)
        else:
            attach(child, part, slot_T)
    return module
