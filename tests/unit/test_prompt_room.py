"""When expanding prompts is the cheaper way."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxserve.mesh import make_mesh
from jaxserve.models.prompt_room import PromptRoom
from jaxserve.models.registry import find_architecture
from kernels_pallas.dispatch import choose_attention
from kernels_pallas.paged_attention.api import AttentionConfig
from tests.compile.models import DEEPSEEK_V31

MODEL = find_architecture(DEEPSEEK_V31).model_config(DEEPSEEK_V31)


def make_room(head_dim: int, num_pages: int) -> PromptRoom:
    """Of pages of 64 tokens."""
    config = AttentionConfig(
        num_layers=1,
        num_q_heads=128,
        num_kv_heads=128,
        head_dim=head_dim,
        page_size=64,
        num_pages=num_pages,
        dtype=jnp.dtype(jnp.bfloat16),
        scale=1.0,
    )
    writer = dataclasses.replace(config, num_q_heads=1, num_kv_heads=1, head_dim=576, value_dim=512, window=1)
    assert MODEL.latent is not None
    mesh = make_mesh(1)
    backend, writing = (choose_attention("xla", each, mesh).backend for each in (config, writer))
    return PromptRoom(MODEL.latent, backend, writing, mesh)


def flops(num_tokens: int, length: int, *, expanded: bool) -> int:
    """Of a prompt's attention, a layer and head, counted pair by pair."""
    pairs = sum(length - num_tokens + token + 1 for token in range(num_tokens))
    if expanded:
        # What is expanded counts twice: it is written and read, too.
        return pairs * 2 * (192 + 128) + (2 * length + num_tokens) * 2 * 512 * (128 + 128)
    return pairs * 2 * (576 + 512) + num_tokens * 2 * 512 * (128 + 128)


@pytest.mark.parametrize(("num_tokens", "length"), [(2, 2), (342, 8192), (360, 8192), (2048, 2048), (512, 8192)])
def test_arithmetic_is_counted(num_tokens: int, length: int) -> None:
    # With room for 160 numbers, keys and values take together what 192 and 128 do.
    room = make_room(160, 1000)
    saved = flops(num_tokens, length, expanded=False) - flops(num_tokens, length, expanded=True)
    assert room.saved_flops([(num_tokens, length)]) == saved
    assert room.saved_flops([(num_tokens, length)] * 2) == 2 * saved
    assert (saved > 0) == (num_tokens in {360, 512, 2048})
    assert saved <= 0 or num_tokens >= room.fewest_tokens


def test_what_does_not_fit_saves_nothing() -> None:
    room = make_room(256, 64)
    assert room.num_tokens == 64 * 64
    assert 0 < room.saved_flops([(2048, 2048), (1024, 2048)]) < float("inf")
    # A page more than there is.
    assert room.saved_flops([(2048, 2049), (1024, 2048)]) == -float("inf")
    assert room.saved_flops([]) == 0


def test_wide_rooms_never_pay() -> None:
    assert make_room(1024, 64).fewest_tokens == float("inf")
