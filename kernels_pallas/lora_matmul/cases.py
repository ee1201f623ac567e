"""LoRA updates whose results are known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.kernel_case import KernelCase
from kernels_pallas.lora_matmul.api import LoraMatmul
from kernels_pallas.lora_matmul.reference import lora_matmul
from kernels_pallas.stacked import Stacked

# (number of slots, number of tokens) -> slot of each token; 0 for none.
Slots = Callable[[int, int], np.ndarray]


def mixed(num_slots: int, num_tokens: int) -> np.ndarray:
    """Tokens of all slots, and some without."""
    return np.random.default_rng(1).integers(0, num_slots + 1, num_tokens)


def of_prompts(num_slots: int, num_tokens: int) -> np.ndarray:
    """Slots in a few long runs, as of prompts; the last tokens have no adapter."""
    return np.sort(mixed(num_slots, num_tokens))[::-1]


def none(num_slots: int, num_tokens: int) -> np.ndarray:
    """No token has an adapter."""
    del num_slots
    return np.zeros(num_tokens, int)


def last_only(num_slots: int, num_tokens: int) -> np.ndarray:
    """Only the last token has an adapter."""
    return np.where(np.arange(num_tokens) == num_tokens - 1, num_slots, 0)


SLOTS: Mapping[str, Slots] = {"mixed": mixed, "of prompts": of_prompts, "none": none, "last only": last_only}


@dataclass(frozen=True, kw_only=True)
class LoraCase:
    """Adapters and tokens.

    Attributes:
        num_tokens, num_inputs, num_outputs, rank, num_slots: sizes.
        slots: the slot of each token.
        dtype: dtype of all arrays.
        members: number of modules that read the same activations.
        nan_token: a token whose activations are NaN.
    """

    num_tokens: int
    num_inputs: int
    num_outputs: int
    rank: int
    num_slots: int
    slots: Slots
    dtype: Any = jnp.bfloat16
    members: int = 1
    nan_token: int | None = None


def lora_case(
    lora: LoraMatmul, case: LoraCase, *, split_inputs: bool = False, split_outputs: bool = False
) -> KernelCase:
    """Return the updates of all modules in the second of three layers; the others must not be read."""
    rng = np.random.default_rng(case.num_tokens)
    x = jnp.asarray(rng.standard_normal((case.num_tokens, case.num_inputs)), case.dtype)
    shape_a = (case.num_slots, case.members * case.rank, case.num_inputs)
    a = jnp.asarray(rng.standard_normal(shape_a) / case.num_inputs**0.5, case.dtype)
    shape_b = (case.members, case.num_slots, case.rank, case.num_outputs)
    b = jnp.asarray(rng.standard_normal(shape_b) / case.rank**0.5, case.dtype)
    slot_T = case.slots(case.num_slots, case.num_tokens)
    if case.nan_token is not None:
        x = x.at[case.nan_token].set(jnp.nan)

    def run(x: jax.Array, a: jax.Array, b: jax.Array, slots: jax.Array, layer: jax.Array) -> list[jax.Array]:
        plan = lora.plan(slots, case.num_slots)
        h = lora.shrink(x, Stacked(a, layer), plan, split=split_inputs)
        matrices = [Stacked(each, layer) for each in b]
        return [lora.expand(h, each, plan, member=i, split=split_outputs) for i, each in enumerate(matrices)]

    def verify(updates: list[jax.Array]) -> None:
        for member, (update, b_SRO) in enumerate(zip(updates, b, strict=True)):
            assert update.dtype == case.dtype
            got = np.asarray(update, np.float64)
            a_SRI = a[:, member * case.rank : (member + 1) * case.rank]
            x64, a64, b64 = (np.asarray(array, np.float64) for array in (x, a_SRI, b_SRO))
            want = lora_matmul(x64, a64, b64, slot_T)
            np.testing.assert_allclose(got, want, atol=1e-5 if case.dtype == jnp.float32 else 0.06, rtol=0)
            assert not np.any(got[slot_T == 0]), "tokens without an adapter have updates"

    among_layers = [
        jnp.stack([jnp.full_like(array, jnp.nan), array, jnp.full_like(array, jnp.nan)], axis=axis)
        for array, axis in ((a, 0), (b, 1))
    ]
    return KernelCase(
        run=run, arguments=(x, *among_layers, jnp.asarray(slot_T, jnp.int32), jnp.int32(1)), verify=verify
    )
