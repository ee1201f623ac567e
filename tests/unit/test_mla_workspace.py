"""The workspace for MLA prefill in the MHA form: its costs, its size, and when a runner uses it."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from jaxserve.config import EngineConfig
from jaxserve.layers.mla_prefill import MlaPrefillWorkspace
from jaxserve.layout.layout import layout_engine, layout_model
from jaxserve.models.registry import find_architecture
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.buckets import Bucket, ForwardShape
from jaxserve.runner.runner import ModelRunner
from jaxserve.step import ScheduledRow, SchedulerOutput
from kernels_pallas.dispatch import choose_attention
from kernels_pallas.paged_attention.api import AttentionConfig
from tests.compile.models import DEEPSEEK_V2_LITE, DEEPSEEK_V31

MLA = find_architecture(DEEPSEEK_V31).model_config(DEEPSEEK_V31).mla
assert MLA is not None
COST = 3


def make_workspace(head_dim: int, num_pages: int) -> MlaPrefillWorkspace:
    """Return a workspace of `num_pages` pages of 64 tokens."""
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
    mesh = make_mesh(1)
    backend = choose_attention("xla", config, mesh).impl
    assert MLA is not None
    return MlaPrefillWorkspace(mla=MLA, backend=backend, write_cost=COST, mesh=mesh)


@pytest.mark.parametrize(("num_tokens", "length"), [(2, 2), (500, 8192), (530, 8192), (2048, 2048)])
def test_arithmetic_is_counted(num_tokens: int, length: int) -> None:
    # With 160 channels each, a key and a value have as many together as with 192 and 128.
    workspace = make_workspace(160, 1000)
    pairs = sum(length - num_tokens + token + 1 for token in range(num_tokens))
    cached = pairs * 2 * (576 + 512)
    expanded = pairs * 2 * (192 + 128) + COST * length * 2 * 512 * (128 + 128)
    assert workspace.costs([(num_tokens, length)]) == (cached, expanded)
    assert workspace.costs([(num_tokens, length)] * 2) == (2 * cached, 2 * expanded)
    assert (expanded < cached) == (num_tokens in {530, 2048})
    assert workspace.can_be_cheaper(num_tokens) == (num_tokens > 500)


def test_what_does_not_fit() -> None:
    workspace = make_workspace(256, 64)
    assert workspace.num_tokens == 64 * 64
    assert workspace.costs([(2048, 2048), (1024, 2048)]).mha < float("inf")
    # One page more than the workspace has.
    assert workspace.costs([(2048, 2049), (1024, 2048)]).mha == float("inf")
    assert workspace.costs([]) == (0, 0)
    # Heads that are wider than the cached vectors are never cheaper.
    assert not make_workspace(1024, 64).can_be_cheaper(4096)


def prompt(num_tokens: int, length: int) -> SchedulerOutput:
    row = ScheduledRow(
        row=0,
        token_ids=(0,) * num_tokens,
        num_computed_tokens=length - num_tokens,
        new_page_ids=(),
        samples=False,
    )
    return SchedulerOutput(step=0, new_rows=(), rows=(row,))


@pytest.mark.parametrize(
    ("plans", "expands"),
    [
        ([prompt(2048, 4096)], True),
        ([prompt(2, 4096)], False),
        ([prompt(1, 4096)], False),
        # More tokens than the workspace holds, in one of the replicas.
        ([prompt(2048, 8193)], False),
        ([prompt(2048, 4096), prompt(2048, 8193)], False),
        # All replicas wait for the one that takes longest.
        ([prompt(2048, 4096), prompt(1, 4096)], True),
        ([prompt(2048, 4096), prompt(2, 4096)], True),
        ([prompt(40, 4096), prompt(2, 4096)], False),
    ],
)
def test_runner_uses_mha_prefill_only_if_cheaper(plans: list[SchedulerOutput], expands: bool) -> None:
    wide, narrow = Bucket(2048, 256), Bucket(512, 256)
    shapes = [ForwardShape(wide), ForwardShape(narrow), ForwardShape(wide, mha_prefill=True)]
    runner: Any = SimpleNamespace(_model=SimpleNamespace(mla_workspace=make_workspace(256, 128)), _shapes=shapes)
    assert ModelRunner._takes_mha_prefill(runner, wide, plans) == expands
    assert not ModelRunner._takes_mha_prefill(runner, narrow, plans)
    runner._model.mla_workspace = None
    assert not ModelRunner._takes_mha_prefill(runner, wide, plans)


POOL_BYTES = 4 << 30


@pytest.mark.parametrize(
    ("pool_bytes", "options", "num_tokens"),
    [
        # A context and a step, or what fits a 32nd of the pool: 16 heads, a key and a value of 192 2-byte channels.
        (POOL_BYTES, {}, 4096 + 512),
        (POOL_BYTES // 2, {"context_length": 16384}, (POOL_BYTES // 64) // (64 * 16 * 2 * 192 * 2) * 64),
        (POOL_BYTES, {"chunked_prefill_size": 64}, None),
        (POOL_BYTES // 64, {}, None),
        (POOL_BYTES, {"deterministic": True}, None),
    ],
)
def test_layout_sizes_mla_workspace(pool_bytes: int, options: dict[str, Any], num_tokens: int | None) -> None:
    config = EngineConfig(model_path="", **{"context_length": 4096, **options})
    layout = layout_model(config, DEEPSEEK_V2_LITE, make_mesh(1))
    engine = layout_engine(config, layout, pool_bytes)
    workspace = engine.step.mla_workspace
    assert (workspace and workspace.num_tokens) == num_tokens
    expanded = [shape.bucket.num_tokens for shape in engine.step.shapes if shape.mha_prefill]
    assert expanded == ([] if num_tokens is None else [512])
    held = engine.pool_bytes + (0 if workspace is None else workspace.num_tokens * 16 * 2 * 192 * 2)
    assert held <= pool_bytes
