"""Test steps for all implementations: shapes, options, and the results expected from numpy.

Everything that no token may read is NaN: slots past a row's end, pages of no row, pages of another layer.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.kernel_case import KernelCase
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionConfig, AttentionMeta, Cache
from kernels_pallas.paged_attention.reference import paged_attention_reference

# The step runs the second of two layers; the pages of the first must not change.
NUM_LAYERS, LAYER = 2, 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step: the query and key lengths of its rows, and the options of the model.

    Attributes:
        q_lens, kv_lens: tokens that each row runs, and its keys after the step; rows that run one token come first.
        num_rows, num_tokens: rows and tokens of the bucket.
        page_size: tokens per page.
        heads: (number of query heads, number of key heads, head dim).
        window, soft_cap: see `AttentionConfig`.
        sinks: whether every head has an attention sink.
        magnitude: keys and values are multiplied by it, queries divided.
        value_dim: see `AttentionConfig`.
        seed: seed of the values and of the order of the pages.
    """

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_rows: int = 8
    num_tokens: int = 128
    page_size: int = 16
    heads: tuple[int, int, int] = (6, 2, 32)
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    magnitude: float = 1.0
    value_dim: int | None = None
    seed: int = 0

    def config(self, dtype: Any, *, batch_invariant: bool = False) -> AttentionConfig:
        """Return the config of the model that runs the step."""
        num_q_heads, num_kv_heads, head_dim = self.heads
        return AttentionConfig(
            num_layers=NUM_LAYERS,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=self.page_size,
            num_pages=max(1, len(self.q_lens)) * self.pages_per_row + 3,
            dtype=dtype,
            scale=head_dim**-0.5,
            window=self.window,
            soft_cap=self.soft_cap,
            value_dim=self.value_dim,
            batch_invariant=batch_invariant,
        )

    @property
    def pages_per_row(self) -> int:
        """Pages per row of the page table."""
        return max([-(-length // self.page_size) for length in self.kv_lens], default=0) + 2

    def with_options(self, **options: Any) -> "Case":
        """Return the same step with other options."""
        return dataclasses.replace(self, **options)


SHAPES = {
    "decode": Case(q_lens=(1, 1, 1), kv_lens=(1, 17, 100), num_tokens=8),
    "one_row_alone": Case(q_lens=(1,), kv_lens=(16,), num_rows=4, num_tokens=4),
    "mixed": Case(q_lens=(1, 1, 30, 70), kv_lens=(33, 48, 30, 90)),
    "short_prefill": Case(q_lens=(5,), kv_lens=(5,), num_tokens=16),
    "many_rows": Case(q_lens=(1,) * 20, kv_lens=tuple(range(1, 201, 10)), num_rows=32, num_tokens=32),
    "chunk_of_a_long_prompt": Case(q_lens=(200,), kv_lens=(333,), num_tokens=256),
    "prefill_rows_side_by_side": Case(q_lens=(2, 3, 90, 17), kv_lens=(2, 50, 90, 700)),
    "tiles_of_both_sizes": Case(q_lens=(1, 130, 5, 128, 300), kv_lens=(9, 130, 205, 128, 431), num_tokens=576),
    "multi_head": Case(q_lens=(1, 40), kv_lens=(21, 40), heads=(4, 4, 16)),
    "multi_query": Case(q_lens=(1, 40), kv_lens=(21, 40), heads=(8, 1, 64)),
    "latent": Case(q_lens=(1, 1, 5, 30), kv_lens=(16, 77, 5, 90), heads=(16, 1, 576), value_dim=512, num_tokens=64),
    "nothing": Case(q_lens=(), kv_lens=()),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 20},
    "tight_window_and_sinks": {"window": 3, "sinks": True},
    "soft_cap_and_sinks": {"soft_cap": 5.0, "sinks": True},
}


class Step(NamedTuple):
    """The arrays of a case, in numpy except for `meta`.

    Attributes:
        q_TNH, k_TKH, v_TKH: f32, rounded to the compute dtype.
        k_PSKH, v_PSKH: f32 pages of all layers before the step, rounded to the cache's dtype.
        meta: metadata of the step.
        sinks_N: f32, or None.
    """

    q_TNH: np.ndarray
    k_TKH: np.ndarray
    v_TKH: np.ndarray
    k_PSKH: np.ndarray
    v_PSKH: np.ndarray
    meta: AttentionMeta
    sinks_N: np.ndarray | None


def make_step(case: Case, config: AttentionConfig) -> Step:
    """Build a step with random keys in shuffled pages."""
    rng = np.random.default_rng(case.seed)
    size, count = case.page_size, len(case.q_lens)
    table_BM = np.zeros((case.num_rows, case.pages_per_row), np.int32)
    ends_B1 = np.zeros(case.num_rows + 1, np.int32)
    ends_B1[1 : count + 1] = np.cumsum(case.q_lens)
    ends_B1[count + 1 :] = ends_B1[count]
    kv_lens_B = np.zeros(case.num_rows, np.int32)
    kv_lens_B[:count] = case.kv_lens
    slot_T = np.full(case.num_tokens, config.num_pages * size, np.int32)
    position_T = np.zeros(case.num_tokens, np.int32)
    pages_2PSKH = np.full((2, NUM_LAYERS * config.num_pages, size, config.num_kv_heads, config.head_dim), np.nan)
    shuffled = iter(rng.permutation(config.num_pages).tolist())
    for row, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        used = -(-kv_len // size)
        table_BM[row, :used] = [next(shuffled) for _ in range(used)]
        position_s = np.arange(kv_len)
        slot_s = table_BM[row, position_s // size] * size + position_s % size
        old = kv_len - q_len
        keys_2sKH = case.magnitude * rng.standard_normal((2, old, config.num_kv_heads, config.head_dim))
        pages_2PSKH[:, LAYER * config.num_pages + slot_s[:old] // size, slot_s[:old] % size] = keys_2sKH
        slot_T[ends_B1[row] : ends_B1[row + 1]] = slot_s[old:]
        position_T[ends_B1[row] : ends_B1[row + 1]] = position_s[old:]

    def activations(heads: int, factor: float) -> np.ndarray:
        return _rounded(factor * rng.standard_normal((case.num_tokens, heads, config.head_dim)), config.compute_dtype)

    num_decode = sum(length == 1 for length in case.q_lens)
    meta = (kv_lens_B, table_BM, ends_B1, np.array([num_decode, count], np.int32), slot_T, position_T)
    k_PSKH, v_PSKH = (_cached(pages_PSKH, config) for pages_PSKH in pages_2PSKH)
    return Step(
        activations(config.num_q_heads, 1 / case.magnitude),
        activations(config.num_kv_heads, case.magnitude),
        activations(config.num_kv_heads, case.magnitude),
        k_PSKH,
        v_PSKH,
        AttentionMeta(*map(jnp.asarray, meta)),
        rng.standard_normal(config.num_q_heads).astype(np.float32) if case.sinks else None,
    )


def expected(case: Case, config: AttentionConfig, step: Step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the expected outputs of a step's live tokens, and the expected pages of keys and values after it."""
    kv_lens_B, table_BM, cu_q_lens_B1 = (np.asarray(array) for array in step.meta[:3])
    live = int(cu_q_lens_B1[-1])
    pages: list[np.ndarray] = []
    read: list[np.ndarray] = []
    for new_TKH, old_PSKH in ((step.k_TKH, step.k_PSKH), (step.v_TKH, step.v_PSKH)):
        slot_t = LAYER * config.num_pages * case.page_size + np.asarray(step.meta.slot_mapping_T)[:live]
        new_PSKH = old_PSKH.copy()
        new_PSKH[slot_t // case.page_size, slot_t % case.page_size] = _cached(new_TKH[:live], config)
        pages.append(new_PSKH)
        read.append(new_PSKH[LAYER * config.num_pages :])
    if case.value_dim is not None:
        pages[1], read[1] = pages[0][..., : case.value_dim], read[0][..., : case.value_dim]
    o_TNH = paged_attention_reference(
        step.q_TNH, read[0], read[1], kv_lens_B, table_BM, cu_q_lens_B1, len(case.q_lens), config, step.sinks_N
    )
    return o_TNH[:live], pages[0], pages[1]


def attention_case(backend: AttentionBackend, case: Case) -> KernelCase:
    """Return a step of a backend, which has the case's config; its results and all pages are compared."""
    config = backend.config
    step = make_step(case, config)
    pages = (jnp.moveaxis(jnp.asarray(x_PSKH), 2, 1) for x_PSKH in (step.k_PSKH, step.v_PSKH))
    specs = backend.cache_spec()
    cache = backend.pack(*pages)
    assert {name: array.shape for name, array in cache.items()} == {name: spec.shape for name, spec in specs.items()}

    def run(
        q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache, meta: AttentionMeta, layer: jax.Array
    ) -> tuple[jax.Array, Cache]:
        sinks = None if step.sinks_N is None else jnp.asarray(step.sinks_N)
        return backend.attend(q, k, v, cache, layer, backend.plan(meta), sinks)

    def verify(result: tuple[jax.Array, Cache]) -> None:
        out, new = result
        got = np.asarray(out.astype(jnp.float32))
        assert np.isfinite(got).all(), "padding tokens hold something that is not finite"
        want, *pages = expected(case, config, step)
        limit = tolerance(case, config) * max(1.0, np.abs(want).max(initial=0.0))
        np.testing.assert_allclose(got[: want.shape[0]], want, rtol=0, atol=limit)
        for before, after, want_PSKH in zip(_unpacked(backend, cache), _unpacked(backend, new), pages, strict=True):
            _check_pages(config, before, after, want_PSKH)

    activations = [jnp.asarray(x).astype(config.compute_dtype) for x in (step.q_TNH, step.k_TKH, step.v_TKH)]
    return KernelCase(run=run, arguments=(*activations, cache, step.meta, jnp.int32(LAYER)), verify=verify)


def _unpacked(backend: AttentionBackend, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and values, f32[P, S, K, H]."""
    k_PSKH, *v_PSKH = (np.asarray(jnp.moveaxis(x_PKSH, 1, 2).astype(jnp.float32)) for x_PKSH in backend.unpack(cache))
    return k_PSKH, v_PSKH[0] if v_PSKH else k_PSKH[..., : backend.config.value_dim]


def _check_pages(config: AttentionConfig, old_PSKH: np.ndarray, new_PSKH: np.ndarray, want_PSKH: np.ndarray) -> None:
    """Check that each slot of a row holds its key and value, and that the other layer is unchanged."""
    np.testing.assert_array_equal(new_PSKH[: config.num_pages], old_PSKH[: config.num_pages])
    held = ~np.isnan(want_PSKH)
    np.testing.assert_array_equal(new_PSKH[held], want_PSKH[held])


def tolerance(case: Case, config: AttentionConfig) -> float:
    """Return the absolute tolerance for values near 1: rounded probabilities and outputs, and a sum over the keys."""
    epsilon = float(jnp.finfo(config.compute_dtype).eps)
    keys = max(case.kv_lens, default=1)
    return 2 * epsilon + 4 * float(np.finfo(np.float32).eps) * keys**0.5


def _rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.float32).astype(dtype).astype(jnp.float32))


def _cached(x_KH: np.ndarray, config: AttentionConfig) -> np.ndarray:
    """Round to the cache's dtype and return f32; NaN stays NaN, even for dtypes without NaN."""
    cached: jax.Array = config.to_cache(jnp.asarray(x_KH, jnp.float32))
    return np.where(np.isnan(x_KH), np.nan, np.asarray(cached.astype(jnp.float32)))
