"""Every attention backend against numpy in float64, with NaN wherever nothing may be read."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.mesh import make_mesh
from kernels_pallas.paged_attention.api import AttentionConfig, AttentionMeta
from kernels_pallas.paged_attention.reference import paged_attention_reference
from kernels_pallas.paged_attention.xla import XlaAttention


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step: how many tokens each row runs and how many keys it then has; single tokens first."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_rows: int = 8
    num_tokens: int = 128
    page_size: int = 16
    heads: tuple[int, int, int] = (6, 2, 32)
    options: dict[str, Any] = field(default_factory=dict)
    sinks: bool = False


SHAPES = {
    "decode": Case(q_lens=(1, 1, 1), kv_lens=(1, 17, 100), num_tokens=8),
    "one_row_alone": Case(q_lens=(1,), kv_lens=(16,), num_rows=4, num_tokens=4),
    "mixed": Case(q_lens=(1, 1, 30, 70), kv_lens=(33, 48, 30, 90)),
    "short_prefill": Case(q_lens=(5,), kv_lens=(5,), num_tokens=16),
    "many_rows": Case(q_lens=(1,) * 20, kv_lens=tuple(range(1, 201, 10)), num_rows=32, num_tokens=32),
    "chunk_of_a_long_prompt": Case(q_lens=(200,), kv_lens=(333,), num_tokens=256),
    "prefill_rows_side_by_side": Case(q_lens=(2, 3, 90, 17), kv_lens=(2, 50, 90, 700)),
    "tiles_of_both_sizes": Case(q_lens=(1, 130, 5, 128, 300), kv_lens=(9, 130, 205, 128, 431), num_tokens=576),
    "pages_of_one_token": Case(q_lens=(1, 1, 9), kv_lens=(3, 70, 40), page_size=1, num_tokens=64),
    "multi_head": Case(q_lens=(1, 40), kv_lens=(21, 40), heads=(4, 4, 16)),
    "multi_query": Case(q_lens=(1, 40), kv_lens=(21, 40), heads=(8, 1, 64)),
    "nothing": Case(q_lens=(), kv_lens=()),
}
OPTIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "window": ({"window": 20}, False),
    "tight_window_and_sinks": ({"window": 3}, True),
    "soft_cap_and_sinks": ({"soft_cap": 5.0}, True),
    "batch_invariant": ({"batch_invariant": True}, False),
    "batch_invariant_window": ({"batch_invariant": True, "window": 20}, True),
}


def run(
    case: Case, dtype: jnp.dtype, options: dict[str, Any], *, sinks: bool, tp_size: int = 1
) -> tuple[np.ndarray, ...]:
    """Backend's output and the reference's, for the live tokens."""
    rng = np.random.default_rng(0)
    num_q_heads, num_kv_heads, head_dim = case.heads
    size, count = case.page_size, len(case.q_lens)
    pages_per_row = max([-(-length // size) for length in case.kv_lens], default=0) + 2
    num_pages, layer = max(1, count) * pages_per_row + 3, 1
    config = AttentionConfig(
        num_layers=2,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=size,
        num_pages=num_pages,
        dtype=dtype,
        scale=head_dim**-0.5,
        **options,
    )
    shuffled = iter(rng.permutation(num_pages).tolist())
    table = np.zeros((case.num_rows, pages_per_row), np.int32)
    ends = np.zeros(case.num_rows + 1, np.int32)
    ends[1 : count + 1] = np.cumsum(case.q_lens)
    ends[count + 1 :] = ends[count]
    kv_lens = np.zeros(case.num_rows, np.int32)
    kv_lens[:count] = case.kv_lens
    slots = np.full(case.num_tokens, num_pages * size, np.int32)
    positions = np.zeros(case.num_tokens, np.int32)
    cache = {name: np.full((2 * num_pages, num_kv_heads, size, head_dim), np.nan, np.float32) for name in "kv"}
    for row, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        used = -(-kv_len // size)
        table[row, :used] = [next(shuffled) for _ in range(used)]
        for position in range(kv_len):
            page, offset = table[row, position // size], position % size
            if position < kv_len - q_len:
                for array in cache.values():
                    array[layer * num_pages + page, :, offset] = rng.standard_normal((num_kv_heads, head_dim))
            else:
                token = ends[row + 1] - (kv_len - position)
                slots[token], positions[token] = page * size + offset, position
    q, k, v = (
        jnp.asarray(rng.standard_normal((case.num_tokens, heads, head_dim)), jnp.float32).astype(dtype)
        for heads in (num_q_heads, num_kv_heads, num_kv_heads)
    )
    num_decode = sum(length == 1 for length in case.q_lens)
    meta = AttentionMeta(kv_lens, table, ends, np.array([num_decode, count], np.int32), slots, positions)
    sink_values = rng.standard_normal(num_q_heads).astype(np.float32) if sinks else None
    backend = XlaAttention(config, make_mesh(tp_size))

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, meta: AttentionMeta, layer: jax.Array) -> Any:
        sinks_N = None if sink_values is None else jnp.asarray(sink_values)
        return backend.attend(q, k, v, cache, layer, backend.plan(meta), sinks_N)

    out, new_cache = attend(
        q,
        k,
        v,
        {name: jnp.asarray(array).astype(dtype) for name, array in cache.items()},
        jax.tree.map(jnp.asarray, meta),
        jnp.int32(layer),
    )
    assert np.isfinite(np.asarray(out.astype(jnp.float32))).all(), "padding tokens hold something finite"
    pages = [
        np.asarray(new_cache[name].astype(jnp.float32))[layer * num_pages :].transpose(0, 2, 1, 3) for name in "kv"
    ]
    untouched = np.asarray(new_cache["k"].astype(jnp.float32))[:num_pages]
    assert np.isnan(untouched).all(), "another layer's pages were written"
    q64 = np.asarray(q.astype(jnp.float32))
    want = paged_attention_reference(q64, *pages, kv_lens, table, ends, count, config, sink_values)
    live = ends[count]
    return np.asarray(out.astype(jnp.float32))[:live], want[:live]


def tolerance(dtype: jnp.dtype, case: Case) -> float:
    """A rounding of the probabilities and of the output, and a sum over the row's keys."""
    epsilon = float(jnp.finfo(dtype).eps)
    keys = max(case.kv_lens, default=1)
    return 4 * epsilon + 4 * float(jnp.finfo(jnp.float32).eps) * keys**0.5


F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
GRID = [(shape, "plain", dtype) for shape in SHAPES for dtype in (F32, BF16)] + [
    (shape, options, F32)
    for options in OPTIONS
    for shape in ("mixed", "many_rows", "chunk_of_a_long_prompt", "multi_query")
    if options != "plain"
]


@pytest.mark.parametrize(("shape", "options", "dtype"), GRID)
def test_matches_numpy(shape: str, options: str, dtype: jnp.dtype) -> None:
    changes, sinks = OPTIONS[options]
    got, want = run(SHAPES[shape], dtype, changes, sinks=sinks)
    error = np.abs(got - want)
    limit = tolerance(dtype, SHAPES[shape]) * max(1.0, np.abs(want).max(initial=0.0))
    assert error.max(initial=0.0) <= limit, f"max {error.max():.2e}, mean {error.mean():.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("shape", ["mixed", "many_rows"])
def test_heads_split_over_devices(shape: str) -> None:
    got, want = run(SHAPES[shape], jnp.float32, {}, sinks=True, tp_size=2)
    np.testing.assert_allclose(got, want, atol=tolerance(jnp.float32, SHAPES[shape]) * 4)
