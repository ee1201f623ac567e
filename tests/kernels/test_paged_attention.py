"""Every attention backend over the same cases against numpy in float64, with NaN in all memory that must not be read.

The Pallas kernels run in interpret mode with race detection; uninitialised memory is NaN, and reads out of bounds
raise.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.parallel.mesh import make_mesh
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionConfig
from kernels_pallas.paged_attention.cases import LAYER, OPTIONS, SHAPES, Case, Step, expected, make_step, tolerance
from kernels_pallas.paged_attention.xla.backend import XlaAttention
from tests.support.marks import slow

F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
FP8, INT8 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.int8)


class Xla:
    """The XLA backend, with keys and values in separate, head-major pages."""

    backend = XlaAttention

    def __init__(self, config: AttentionConfig, tp_size: int) -> None:
        self.attention: AttentionBackend = self.backend(config, make_mesh(tp_size))

    @staticmethod
    def to_cache(config: AttentionConfig, k_PSKH: jax.Array, v_PSKH: jax.Array) -> dict[str, jax.Array]:
        pages = {"k": k_PSKH} if config.value_dim is not None else {"k": k_PSKH, "v": v_PSKH}
        return {name: jnp.moveaxis(x_PSKH, 2, 1).astype(config.dtype) for name, x_PSKH in pages.items()}


class Tpu:
    """The TPU backend, with keys next to values in one array of pages."""

    def __init__(self, config: AttentionConfig, tp_size: int) -> None:
        from jax.experimental.pallas import tpu as pltpu

        from kernels_pallas.paged_attention.tpu.backend import TpuAttention
        from kernels_pallas.pallas import TpuMemory

        params = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
        self.attention: AttentionBackend = TpuAttention(
            config, make_mesh(tp_size), TpuMemory(64 << 20, 1 << 20), interpret=params
        )

    @staticmethod
    def to_cache(config: AttentionConfig, k_PSKH: jax.Array, v_PSKH: jax.Array) -> dict[str, jax.Array]:
        from kernels_pallas.paged_attention.tpu.layout import TpuLayout

        packed_PSKZ = TpuLayout.of(config).pack(k_PSKH, v_PSKH)
        return {"kv": jnp.moveaxis(packed_PSKZ, 2, 1).astype(config.dtype)}


class Gpu(Xla):
    """The GPU backend, with the layout of `Xla` and tiles that the interpreter can run, on two multiprocessors."""

    def __init__(self, config: AttentionConfig, tp_size: int) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        from kernels_pallas.paged_attention.gpu.backend import GpuAttention
        from kernels_pallas.paged_attention.gpu.tile import choose_tile

        tiles = tuple(
            dataclasses.replace(choose_tile(config, decode=decode), interpretable=True) for decode in (True, False)
        )
        params = plgpu.InterpretGPUParams(detect_races=True)
        self.attention: AttentionBackend = GpuAttention(
            config, make_mesh(tp_size), num_cores=2, tiles=tiles, interpret=params
        )


def run(
    implementation: type[Xla | Tpu], case: Case, dtype: jnp.dtype, *, tp_size: int = 1, batch_invariant: bool = False
) -> None:
    """Run a case and compare its results and pages with the expected ones."""
    config = case.config(dtype, batch_invariant=batch_invariant)
    step = make_step(case, config)
    attention = implementation(config, tp_size).attention
    old = implementation.to_cache(config, jnp.asarray(step.k_PSKH), jnp.asarray(step.v_PSKH))
    specs = attention.cache_spec()
    assert {name: array.shape for name, array in old.items()} == {name: spec.shape for name, spec in specs.items()}
    old = {name: jax.lax.bitcast_convert_type(array, specs[name].dtype) for name, array in old.items()}
    out, new = _attend(attention, step, old)
    got = np.asarray(out.astype(jnp.float32))
    assert np.isfinite(got).all(), "padding tokens hold something finite"
    want, *pages = expected(case, config, step)
    np.testing.assert_allclose(
        got[: want.shape[0]], want, rtol=0, atol=tolerance(case, config) * max(1.0, np.abs(want).max(initial=0.0))
    )
    _check_pages(config, _unpacked(attention, old), _unpacked(attention, new), pages)


def _attend(attention: AttentionBackend, step: Step, cache: dict[str, jax.Array]) -> Any:
    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, meta: Any, layer: jax.Array) -> Any:
        sinks = None if step.sinks_N is None else jnp.asarray(step.sinks_N)
        return attention.attend(q, k, v, cache, layer, attention.plan(meta), sinks)

    activations = [jnp.asarray(x).astype(attention.config.compute_dtype) for x in (step.q_TNH, step.k_TKH, step.v_TKH)]
    return attend(*activations, cache, step.meta, jnp.int32(LAYER))


def _unpacked(attention: AttentionBackend, cache: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return keys and values, [P, S, K, H]."""
    k_PSKH, *v_PSKH = (jnp.moveaxis(x_PKSH, 1, 2) for x_PKSH in attention.unpack(cache))
    return k_PSKH, v_PSKH[0] if v_PSKH else k_PSKH[..., : attention.config.value_dim]


def _check_pages(config: AttentionConfig, old: Any, new: Any, want: list[np.ndarray]) -> None:
    """Check that each slot of a row holds its key and value, and that the other layer is unchanged."""
    for before, after, want_PSKH in zip(old, new, want, strict=True):
        old_PSKH, new_PSKH = (np.asarray(x.astype(jnp.float32)) for x in (before, after))
        np.testing.assert_array_equal(new_PSKH[: config.num_pages], old_PSKH[: config.num_pages])
        held = ~np.isnan(want_PSKH)
        np.testing.assert_array_equal(new_PSKH[held], want_PSKH[held])


# "mixed" has single tokens and prompts, "many_rows" only single tokens; the other shapes resemble parts of these.
_PARTS = ("decode", "one_row_alone", "short_prefill", "multi_head", "latent")
PLAIN = [slow(shape, "plain", F32) if shape in _PARTS else (shape, "plain", F32) for shape in SHAPES]
PLAIN += [("mixed", "plain", BF16), slow("decode", "plain", BF16), slow("chunk_of_a_long_prompt", "plain", BF16)]
WITH_OPTIONS = [
    (shape, options, F32)
    if (shape, options) == ("chunk_of_a_long_prompt", "window") or shape == "mixed"
    else slow(shape, options, F32)
    for options in OPTIONS
    for shape in ("mixed", "many_rows", "chunk_of_a_long_prompt")
    if options != "plain"
]
needs_pallas = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")


@pytest.mark.parametrize(("shape", "options", "dtype"), PLAIN + WITH_OPTIONS)
@pytest.mark.parametrize("implementation", [Xla, pytest.param(Tpu, marks=needs_pallas)])
def test_matches_numpy(implementation: type[Any], shape: str, options: str, dtype: jnp.dtype) -> None:
    run(implementation, SHAPES[shape].with_options(**OPTIONS[options]), dtype)


# The GPU kernels multiply in bf16 and support head dims from 64 on. Their interpreter takes half a minute per case.
_ALIKE = ("decode", "short_prefill", "tiles_of_both_sizes", "multi_head", "multi_query", "one_row_alone", "mixed")
GPU_CASES = [
    *(slow(shape, "plain") if shape in _ALIKE else (shape, "plain") for shape in SHAPES if shape != "latent"),
    *(
        slow("mixed", options) if options == "window" else ("mixed", options)
        for options in OPTIONS
        if options != "plain"
    ),
    *(slow("chunk_of_a_long_prompt", options) for options in OPTIONS if options != "plain"),
]


@needs_pallas
@pytest.mark.parametrize(("shape", "options"), GPU_CASES)
def test_gpu_matches_numpy(shape: str, options: str) -> None:
    case = SHAPES[shape].with_options(**OPTIONS[options])
    run(Gpu, case.with_options(heads=(*case.heads[:2], 64)), BF16)


def test_xla_takes_pages_of_any_size() -> None:
    case = Case(q_lens=(1, 1, 9), kv_lens=(3, 70, 40), page_size=1, num_tokens=64)
    run(Xla, case, F32)


@pytest.mark.parametrize("head_dim", [slow(64), 80, slow(96), slow(128), 256])
@pytest.mark.parametrize("implementation", [pytest.param(one, marks=needs_pallas) for one in (Tpu, Gpu)])
def test_head_dims(implementation: type[Any], head_dim: int) -> None:
    case = Case(q_lens=(1, 1, 5), kv_lens=(16, 40, 37), num_tokens=16, heads=(4, 2, head_dim))
    run(implementation, case, BF16)


@pytest.mark.parametrize("page_size", [32, slow(64), slow(128), 256])
@pytest.mark.parametrize("implementation", [pytest.param(one, marks=needs_pallas) for one in (Tpu, Gpu)])
def test_page_sizes(implementation: type[Any], page_size: int) -> None:
    # The last slot of a page, the first slot of the next, and a chunk that crosses into the next page.
    case = Case(
        q_lens=(1, 1, 40),
        kv_lens=(page_size, page_size + 1, page_size + 20),
        num_tokens=48,
        page_size=page_size,
        heads=(6, 2, 64),
    )
    run(implementation, case, BF16)


@pytest.mark.parametrize("page_size", [16, slow(64)])
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
@pytest.mark.parametrize("implementation", [Xla, *(pytest.param(one, marks=needs_pallas) for one in (Tpu, Gpu))])
def test_quantised_cache(implementation: type[Any], dtype: jnp.dtype, page_size: int) -> None:
    case = Case(
        q_lens=(1, 1, 30, 70),
        kv_lens=(33, 48, 30, 90),
        heads=(6, 2, 64),
        page_size=page_size,
        # Some elements exceed the range of int8.
        magnitude=50.0 if dtype == INT8 else 1.0,
    )
    run(implementation, case, dtype)


@pytest.mark.parametrize("dtype", [BF16, slow(FP8), INT8], ids=str)
@pytest.mark.parametrize("implementation", [Xla, *(pytest.param(one, marks=needs_pallas) for one in (Tpu, Gpu))])
def test_values_that_are_a_part_of_their_keys(implementation: type[Any], dtype: jnp.dtype) -> None:
    run(implementation, SHAPES["latent"].with_options(magnitude=30.0 if dtype == INT8 else 1.0), dtype)


@pytest.mark.parametrize("group", [slow(1), 7, slow(8)])
@pytest.mark.parametrize("implementation", [pytest.param(one, marks=needs_pallas) for one in (Tpu, Gpu)])
def test_groups(implementation: type[Any], group: int) -> None:
    case = Case(q_lens=(1, 3, 20), kv_lens=(18, 3, 37), num_tokens=32, heads=(2 * group, 2, 64))
    run(implementation, case, BF16)


@needs_pallas
@pytest.mark.parametrize(
    "case", [slow({"heads": (160, 2, 64), "sinks": True}), {"heads": (128, 1, 576), "value_dim": 512}], ids=str
)
def test_more_query_heads_than_a_gpu_tile_holds(case: dict[str, Any]) -> None:
    """The heads take several passes, of 40 heads or of 64."""
    run(Gpu, Case(q_lens=(1, 1, 3), kv_lens=(18, 3, 37), num_tokens=16, **case), BF16)


@pytest.mark.parametrize(
    ("shape", "window"), [("mixed", None), slow("mixed", 20), slow("many_rows", None), ("many_rows", 20)]
)
@pytest.mark.parametrize("implementation", [Xla, *(pytest.param(one, marks=needs_pallas) for one in (Tpu, Gpu))])
def test_batch_invariant(implementation: type[Any], shape: str, window: int | None) -> None:
    case = SHAPES[shape].with_options(window=window)
    if implementation is Gpu:
        case = case.with_options(heads=(6, 2, 64))
    run(implementation, case, BF16 if implementation is Gpu else F32, batch_invariant=True)


@pytest.mark.parametrize("shape", ["mixed", slow("many_rows")])
@pytest.mark.parametrize("implementation", [Xla, pytest.param(Tpu, marks=needs_pallas)])
def test_heads_split_over_devices(implementation: type[Any], shape: str) -> None:
    run(implementation, SHAPES[shape].with_options(sinks=True), F32, tp_size=2)


@needs_pallas
@pytest.mark.parametrize("window", [None, 100])
def test_tpu_decode_reads_live_pages_once(window: int | None) -> None:
    from kernels_pallas.paged_attention.tpu.layout import TpuLayout
    from kernels_pallas.paged_attention.tpu.schedule import KernelShape, decode_bytes

    config = Case(q_lens=(), kv_lens=(), page_size=64, heads=(32, 8, 128), window=window).config(BF16)
    shape = KernelShape(
        config=config,
        layout=TpuLayout.of(config),
        block_tokens=1,
        pages_per_buffer=4,
        num_table_entries=64,
    )
    kv_lens = [1, 64, 65, 1000, 4000]
    token_bytes = 2 * 8 * 128 * 2
    seen = [length if window is None else min(length, window) for length in kv_lens]
    # A partly live page at either end, a tile of 16 tokens written, the new token, a query and a result.
    constant = (2 * 64 + 16 + 1) * token_bytes + 2 * 32 * 128 * 2
    got = decode_bytes(shape, kv_lens)
    assert sum(seen) * token_bytes <= got <= sum(seen) * token_bytes + len(kv_lens) * constant


@needs_pallas
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_gpu_decode_reads_live_pages_once(page_size: int, window: int | None) -> None:
    from kernels_pallas.paged_attention.gpu.backend import GpuAttention

    config = Case(q_lens=(), kv_lens=(), page_size=page_size, heads=(32, 8, 128), window=window).config(BF16)
    kv_lens = [1, 64, 65, 1000, 4000]
    token_bytes = 2 * 8 * 128 * 2
    seen = [length if window is None else min(length, window) for length in kv_lens]
    # Two thread blocks a core, twice, for eight heads; the five rows end in one item each that is not full.
    items = 2 * 2 * 132 / 8 + len(kv_lens)
    # A partly live page at either end; a query and a partial result, written and read, padded to 8 heads; the result.
    constant = len(kv_lens) * (2 * 64 * token_bytes + 32 * 128 * 2) + items * 8 * 8 * (2 * 128 + 2 * 4 * 130)
    got = GpuAttention(config, make_mesh(1)).decode_bytes(kv_lens, 8)
    assert sum(seen) * token_bytes <= got <= sum(seen) * token_bytes + constant
