"""Every attention backend over the same cases against numpy in float64, with NaN in all memory that must not be read.

The Pallas kernels run in interpret mode with race detection; uninitialised memory is NaN, and reads out of bounds
raise.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.parallel.mesh import make_mesh
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionConfig
from kernels_pallas.paged_attention.cases import OPTIONS, SHAPES, Case, attention_case
from kernels_pallas.paged_attention.xla.backend import XlaAttention
from tests.support.kernels import KERNELS, interpreted, needs_pallas
from tests.support.marks import slow

F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
FP8, INT8 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.int8)


def implementation(name: str, config: AttentionConfig, tp_size: int, tpu_cores: int = 1) -> AttentionBackend:
    if name == "xla":
        return XlaAttention(config, make_mesh(tp_size))
    return interpreted(name, tp_size, tpu_cores=tpu_cores).attention(config)


def run(
    name: str, case: Case, dtype: jnp.dtype, *, tp_size: int = 1, tpu_cores: int = 1, batch_invariant: bool = False
) -> None:
    """Run a case and compare its results and pages with the expected ones."""
    config = case.config(dtype, batch_invariant=batch_invariant)
    step = attention_case(implementation(name, config, tp_size, tpu_cores), case)
    step.verify(jax.jit(step.run)(*step.arguments))


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


@pytest.mark.parametrize(("shape", "options", "dtype"), PLAIN + WITH_OPTIONS)
@pytest.mark.parametrize("name", ["xla", KERNELS[0]])
def test_matches_numpy(name: str, shape: str, options: str, dtype: jnp.dtype) -> None:
    run(name, SHAPES[shape].with_options(**OPTIONS[options]), dtype)


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
    run("gpu", case.with_options(heads=(*case.heads[:2], 64)), BF16)


def test_xla_takes_pages_of_any_size() -> None:
    case = Case(q_lens=(1, 1, 9), kv_lens=(3, 70, 40), page_size=1, num_tokens=64)
    run("xla", case, F32)


@pytest.mark.parametrize("head_dim", [slow(64), 80, slow(96), slow(128), 256])
@pytest.mark.parametrize("name", KERNELS)
def test_head_dims(name: str, head_dim: int) -> None:
    case = Case(q_lens=(1, 1, 5), kv_lens=(16, 40, 37), num_tokens=16, heads=(4, 2, head_dim))
    run(name, case, BF16)


@pytest.mark.parametrize("page_size", [32, slow(64), slow(128), 256])
@pytest.mark.parametrize("name", KERNELS)
def test_page_sizes(name: str, page_size: int) -> None:
    # The last slot of a page, the first slot of the next, and a chunk that crosses into the next page.
    case = Case(
        q_lens=(1, 1, 40),
        kv_lens=(page_size, page_size + 1, page_size + 20),
        num_tokens=48,
        page_size=page_size,
        heads=(6, 2, 64),
    )
    run(name, case, BF16)


@pytest.mark.parametrize("page_size", [16, slow(64)])
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_quantised_cache(name: str, dtype: jnp.dtype, page_size: int) -> None:
    case = Case(
        q_lens=(1, 1, 30, 70),
        kv_lens=(33, 48, 30, 90),
        heads=(6, 2, 64),
        page_size=page_size,
        # Some elements exceed the range of int8.
        magnitude=50.0 if dtype == INT8 else 1.0,
    )
    run(name, case, dtype)


@pytest.mark.parametrize("dtype", [BF16, slow(FP8), INT8], ids=str)
@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_values_that_are_a_part_of_their_keys(name: str, dtype: jnp.dtype) -> None:
    run(name, SHAPES["latent"].with_options(magnitude=30.0 if dtype == INT8 else 1.0), dtype)


@pytest.mark.parametrize("group", [slow(1), 7, slow(8)])
@pytest.mark.parametrize("name", KERNELS)
def test_groups(name: str, group: int) -> None:
    case = Case(q_lens=(1, 3, 20), kv_lens=(18, 3, 37), num_tokens=32, heads=(2 * group, 2, 64))
    run(name, case, BF16)


@needs_pallas
@pytest.mark.parametrize("heads", [(8, 2, 128), slow((16, 8, 64)), slow((8, 8, 64))])
def test_queries_of_several_key_heads_fill_a_tile_of_a_gpu(heads: tuple[int, int, int]) -> None:
    """Groups of four, two and one query heads are copied together, eight heads at a time."""
    run("gpu", Case(q_lens=(1, 1, 1, 4), kv_lens=(18, 40, 1, 37), num_tokens=16, heads=heads, sinks=True), BF16)


@needs_pallas
@pytest.mark.parametrize(
    "case", [slow({"heads": (160, 2, 64), "sinks": True}), {"heads": (128, 1, 576), "value_dim": 512}], ids=str
)
def test_more_query_heads_than_a_gpu_tile_holds(case: dict[str, Any]) -> None:
    """The heads take several passes, of 40 heads or of 64."""
    run("gpu", Case(q_lens=(1, 1, 3), kv_lens=(18, 3, 37), num_tokens=16, **case), BF16)


@pytest.mark.parametrize(
    ("shape", "window"), [("mixed", None), slow("mixed", 20), slow("many_rows", None), ("many_rows", 20)]
)
@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_batch_invariant(name: str, shape: str, window: int | None) -> None:
    case = SHAPES[shape].with_options(window=window)
    if name == "gpu":
        case = case.with_options(heads=(6, 2, 64))
    run(name, case, BF16 if name == "gpu" else F32, batch_invariant=True)


@pytest.mark.parametrize("shape", ["mixed", slow("many_rows")])
@pytest.mark.parametrize("name", ["xla", KERNELS[0]])
def test_heads_split_over_devices(name: str, shape: str) -> None:
    run(name, SHAPES[shape].with_options(sinks=True), F32, tp_size=2)


@pytest.mark.parametrize("heads", [pytest.param((8, 2, 64), id="heads"), pytest.param((8, 1, 64), id="rows")])
@pytest.mark.parametrize("shape", ["mixed", "decode", "one_row_alone", slow("many_rows"), slow("nothing")])
@needs_pallas
def test_two_cores_of_a_tpu_share(shape: str, heads: tuple[int, int, int]) -> None:
    run("tpu", SHAPES[shape].with_options(heads=heads, sinks=True), F32, tpu_cores=2)


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
