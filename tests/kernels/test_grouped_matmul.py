"""Grouped matmuls against numpy in float64; the Pallas kernels run in interpret mode, with race detection."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.layers.context import LinearOps
from jaxserve.layers.linear_kernel import StackedMatrix, multiply
from jaxserve.parallel.mesh import make_mesh
from kernels_pallas.grouped_matmul.api import ExpertShape, GroupedMatmul, HeadMatmul, HeadMatrices, Matrices
from kernels_pallas.grouped_matmul.reference import grouped_matmul
from kernels_pallas.grouped_matmul.xla.backend import XlaGroupedMatmul
from kernels_pallas.grouped_matmul.xla.heads import multiply_heads
from kernels_pallas.quantized import QuantizedFormat
from kernels_pallas.token_tiles import Blocks, max_num_blocks, sort_into_blocks
from tests.support.marks import slow

needs_pallas = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
# Bytes of a row of activations, few enough that they do not limit the number of rows in a block.
ROW_BYTES = 1024
# SMs of the GPU for which tiles are chosen.
NUM_CORES = 16
KERNELS = [pytest.param("tpu", marks=needs_pallas), pytest.param("gpu", marks=needs_pallas)]


def implementation(name: str) -> GroupedMatmul:
    if name == "xla":
        return XlaGroupedMatmul()
    if name == "tpu":
        from jax.experimental.pallas import tpu as pltpu

        from kernels_pallas.grouped_matmul.tpu.backend import TpuGroupedMatmul

        return TpuGroupedMatmul(
            pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
        )
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels_pallas.grouped_matmul.gpu.backend import GpuGroupedMatmul
    from kernels_pallas.grouped_matmul.gpu.narrow import GpuNarrowMatmul

    params = plgpu.InterpretGPUParams(detect_races=True)
    return GpuNarrowMatmul(params) if name == "gpu narrow" else GpuGroupedMatmul(NUM_CORES, params)


def check_quantized(name: str, group_R: np.ndarray, num_groups: int, sizes: tuple[int, int]) -> None:
    """Check a grouped matmul by fp8 matrices with a scale for each block of 128 x 128 elements."""
    matmul, (num_outputs, num_inputs) = implementation(name), sizes
    rng = np.random.default_rng(4)
    x_RI = jnp.asarray(rng.standard_normal((len(group_R), num_inputs)), jnp.bfloat16)
    w_XOI = jnp.asarray(rng.standard_normal((2 * num_groups, *sizes)), jnp.float8_e4m3fn)
    scale_Xoi = rng.uniform(0.5, 2, (2 * num_groups, num_outputs // 128, num_inputs // 128)) / num_inputs**0.5
    scale_Xoi = jnp.asarray(scale_Xoi, jnp.float32)

    @jax.jit
    def run(x_RI: jax.Array, w_XOI: jax.Array, scale_Xoi: jax.Array, group_R: jax.Array) -> jax.Array:
        blocks, permuted = sort_into_blocks(group_R, num_groups, matmul.block_rows(len(group_R), num_groups, ROW_BYTES))
        matrices = Matrices(w_XOI, scale_Xoi, format=QuantizedFormat("fp8", (128, 128)))
        (y_PO,) = matmul(x_RI[permuted.row_P], [matrices], blocks._replace(group_C=blocks.group_C + num_groups))
        return y_PO[permuted.block_row_R]

    got = run(x_RI, w_XOI, scale_Xoi, jnp.asarray(group_R, jnp.int32))
    scale_XOI = np.repeat(np.repeat(np.asarray(scale_Xoi, np.float64), 128, 1), 128, 2)
    w64_XOI = np.asarray(w_XOI, np.float64) * scale_XOI
    want = grouped_matmul(np.asarray(x_RI, np.float64), w64_XOI[num_groups:], group_R)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.06)


def check(
    name: str,
    group_R: np.ndarray,
    num_groups: int,
    sizes: tuple[int, int],
    dtype: Any,
    *,
    transposed: bool = False,
) -> None:
    """Check rows that are sorted into blocks, multiplied by the second of three layers' matrices, and put back."""
    matmul, (num_outputs, num_inputs) = implementation(name), sizes
    num_rows = len(group_R)
    rng = np.random.default_rng(num_rows)
    x_RI = jnp.asarray(rng.standard_normal((num_rows, num_inputs)), dtype)
    w_LGOI = rng.standard_normal((3, num_groups, num_outputs, num_inputs)) / num_inputs**0.5
    # Matrices that no row uses must not be read.
    unused = np.setdiff1d(np.arange(num_groups), group_R)
    w_LGOI[[0, 2]] = np.nan
    w_LGOI[1, unused] = np.nan
    w_XOI = jnp.asarray(w_LGOI.reshape(-1, *sizes), dtype)

    @jax.jit
    def run(x_RI: jax.Array, w_XOI: jax.Array, group_R: jax.Array) -> jax.Array:
        blocks, permuted = sort_into_blocks(group_R, num_groups, matmul.block_rows(num_rows, num_groups, ROW_BYTES))
        matrices = Matrices(w_XOI.swapaxes(1, 2) if transposed else w_XOI)
        blocks = blocks._replace(group_C=blocks.group_C + num_groups)
        (y_PO,) = matmul(x_RI[permuted.row_P], [matrices], blocks, transposed=transposed)
        return y_PO.at[permuted.block_row_R].get(mode="fill", fill_value=0)

    got = run(x_RI, w_XOI, jnp.asarray(group_R, jnp.int32))
    assert got.dtype == dtype
    here = group_R < num_groups
    want = grouped_matmul(
        np.asarray(x_RI, np.float64)[here], np.asarray(w_XOI[num_groups : 2 * num_groups], np.float64), group_R[here]
    )
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got[here], want, atol=1e-5 if dtype == jnp.float32 else 0.04)
    assert not np.any(got[~here])


def spread(num_groups: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, num_groups, num_rows)


def some_elsewhere(num_groups: int, num_rows: int) -> np.ndarray:
    """Return the group of each row, with none for some rows, as if their experts were on other devices."""
    return np.random.default_rng(3).integers(0, 2 * num_groups, num_rows).clip(max=num_groups)


def all_in_one(num_groups: int, num_rows: int) -> np.ndarray:
    return np.full(num_rows, num_groups - 2)


def all_elsewhere(num_groups: int, num_rows: int) -> np.ndarray:
    return np.full(num_rows, num_groups)


@pytest.mark.parametrize("groups", [spread, some_elsewhere, all_in_one, all_elsewhere])
@pytest.mark.parametrize("sizes", [(64, 128), (384, 64)])
@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_grouped_matmul_matches_numpy(name: str, sizes: tuple[int, int], groups: Any) -> None:
    check(name, groups(5, 200), 5, sizes, jnp.bfloat16)


@pytest.mark.parametrize(
    ("sizes", "transposed"), [((16, 128), False), ((48, 64), False), ((192, 16), True), ((64, 96), True)]
)
@pytest.mark.parametrize("name", ["xla", KERNELS[0], pytest.param("gpu narrow", marks=needs_pallas)])
def test_lora_matrices(name: str, sizes: tuple[int, int], transposed: bool) -> None:
    """Ranks from 16 on: they are the outputs of an A matrix and the inputs of a B matrix, which is stored [in, out]."""
    check(name, some_elsewhere(6, 70), 6, sizes, jnp.bfloat16, transposed=transposed)


@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_fewer_rows_than_groups(name: str) -> None:
    check(name, spread(40, 12), 40, (128, 64), jnp.bfloat16)


@pytest.mark.parametrize("sizes", [(128, 384), (384, 128)])
@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_matrices_of_8_bits(name: str, sizes: tuple[int, int]) -> None:
    check_quantized(name, spread(4, 90), 4, sizes)


FORMATS = {
    "mxfp4": (QuantizedFormat("mxfp4", (1, 32)), jnp.uint8),
    "int4": (QuantizedFormat("int4", (1, 32)), jnp.bfloat16),
    "int4 with zeros": (QuantizedFormat("int4", (1, 64)), jnp.float32),
    "int4 of 128": (QuantizedFormat("int4", (1, 128)), jnp.float16),
    "int4 by row": (QuantizedFormat("int4", (1, 0)), jnp.float32),
    "int8": (QuantizedFormat("int8", (1, 0)), jnp.float32),
    "fp8": (QuantizedFormat("fp8", (1, 0)), jnp.float32),
}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def random_matrices(name: str, shape: tuple[int, int, int]) -> tuple[Matrices, np.ndarray]:
    """Return quantised matrices, and the same matrices dequantised, f64[X, O, I]."""
    (format, scale_dtype), (*lead, num_inputs) = FORMATS[name], shape
    rng = np.random.default_rng(5)
    columns = format.block[1] or num_inputs
    num_groups = -(-num_inputs // columns)
    zero = None
    if format.per_byte == 2:
        code = rng.integers(0, 16, shape)
        values = jnp.asarray(code[..., ::2] | code[..., 1::2] << 4, jnp.uint8)
        zero = rng.integers(0, 16, (*lead, num_groups)) if name == "int4 with zeros" else None
        middle = 8 if zero is None else np.repeat(zero, columns, -1)
        elements = E2M1[code] if name == "mxfp4" else code - middle
    else:
        values = jnp.asarray(rng.uniform(-100, 100, shape), format.dtype)
        elements = np.asarray(values, np.float64)
    size = 1 / (np.abs(elements).max() * num_inputs**0.5)
    if scale_dtype == jnp.uint8:
        exponent = rng.integers(-2, 3, (*lead, num_groups)) + int(np.log2(size))
        scale, scale64 = jnp.asarray(exponent + 127, jnp.uint8), np.exp2(exponent)
    else:
        scale = jnp.asarray(rng.uniform(0.5, 2, (*lead, num_groups)) * size, scale_dtype)
        scale64 = np.asarray(scale, np.float64)
    w64_XOI = elements * np.repeat(scale64, columns, -1)[..., :num_inputs]
    return Matrices(values, scale, None if zero is None else jnp.asarray(zero, jnp.uint8), format), w64_XOI


@pytest.mark.parametrize("dtype", [jnp.bfloat16, slow(jnp.float32)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["xla", pytest.param("tpu", marks=needs_pallas)])
def test_matrices_with_scales_of_groups(name: str, format: str, dtype: Any) -> None:
    """A row of 192 4-bit inputs has 96 bytes, which is fewer than a vector has lanes."""
    matmul, group_R = implementation(name), spread(3, 40)
    matrices, w64_XOI = random_matrices(format, (3, 136, 192))
    x_RI = jnp.asarray(np.random.default_rng(6).standard_normal((40, 192)), dtype)

    @jax.jit
    def run(x_RI: jax.Array, group_R: jax.Array, *arrays: Any) -> jax.Array:
        blocks, permuted = sort_into_blocks(group_R, 3, matmul.block_rows(40, 3, ROW_BYTES))
        (y_PO,) = matmul(x_RI[permuted.row_P], [Matrices(*arrays, matrices.format)], blocks)
        return y_PO[permuted.block_row_R]

    got = run(x_RI, jnp.asarray(group_R, jnp.int32), *matrices[:3])
    want = grouped_matmul(np.asarray(x_RI, np.float64), w64_XOI, group_R)
    # Weights and results are rounded to the dtype.
    tolerance = {"atol": 1e-5} if dtype == jnp.float32 else {"atol": 0.01, "rtol": 2**-7}
    np.testing.assert_allclose(np.asarray(got, np.float64), want, **tolerance)


@needs_pallas
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(64, 192), slow(256, 256)])
@pytest.mark.parametrize("format", FORMATS)
def test_matrices_with_scales_of_groups_on_gpu(format: str, num_outputs: int, num_inputs: int) -> None:
    """A step takes 48 or 64 bytes of a row of 4-bit elements, and 16, 32, 48 or 64 of them share a scale."""
    matmul, group_R = implementation("gpu"), spread(3, 70)
    matrices, w64_XOI = random_matrices(format, (3, num_outputs, num_inputs))
    x_RI = jnp.asarray(np.random.default_rng(6).standard_normal((70, num_inputs)), jnp.bfloat16)

    @jax.jit
    def run(x_RI: jax.Array, group_R: jax.Array, *arrays: Any) -> jax.Array:
        blocks, permuted = sort_into_blocks(group_R, 3, matmul.block_rows(70, 3, ROW_BYTES))
        (y_PO,) = matmul(x_RI[permuted.row_P], [Matrices(*arrays, matrices.format)], blocks)
        return y_PO[permuted.block_row_R]

    got = run(x_RI, jnp.asarray(group_R, jnp.int32), *matrices[:3])
    want = grouped_matmul(np.asarray(x_RI, np.float64), w64_XOI, group_R)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.01, rtol=2**-7)


@needs_pallas
@pytest.mark.slow
def test_a_cut_block_of_8_bits() -> None:
    """2,176 outputs of 4,096 inputs make two blocks of 1,024 outputs and one of 128."""
    check_quantized("tpu", spread(2, 20), 2, (2176, 4096))


@needs_pallas
def test_tpus_take_any_size_and_float32() -> None:
    """The outputs make several blocks, the last of which is partial, and the inputs are no multiple of 128."""
    check("tpu", spread(3, 20), 3, (300, 8200), jnp.float32)


@needs_pallas
@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        (ExpertShape(128, 72, jnp.dtype(jnp.bfloat16)), "72 inputs"),
        (ExpertShape(360, 128, jnp.dtype(jnp.bfloat16)), "360 outputs"),
        (ExpertShape(128, 128, jnp.dtype(jnp.float32)), "float32"),
        (ExpertShape(64, 144, jnp.dtype(jnp.bfloat16), QuantizedFormat("mxfp4", (1, 32))), "144 inputs"),
        (ExpertShape(64, 128, jnp.dtype(jnp.bfloat16), QuantizedFormat("int4", (1, 16))), "blocks of .1, 16."),
        (ExpertShape(64, 128, jnp.dtype(jnp.bfloat16), transposed=True), "outputs, inputs"),
    ],
)
def test_what_the_gpu_kernel_cannot_do(shape: ExpertShape, problem: str) -> None:
    from kernels_pallas.grouped_matmul.gpu.backend import check_shape

    with pytest.raises(NotImplementedError, match=problem):
        check_shape(shape)


@needs_pallas
@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        (ExpertShape(128, 72, jnp.dtype(jnp.bfloat16)), "72 inputs"),
        (ExpertShape(40, 128, jnp.dtype(jnp.bfloat16)), "40 outputs"),
        (ExpertShape(48, 128, jnp.dtype(jnp.float32)), "float32"),
        (ExpertShape(128, 128, jnp.dtype(jnp.bfloat16), QuantizedFormat("fp8", (128, 128))), "fp8"),
    ],
)
def test_what_the_gpu_kernel_of_narrow_matrices_cannot_do(shape: ExpertShape, problem: str) -> None:
    from kernels_pallas.grouped_matmul.gpu.narrow import check_shape

    with pytest.raises(NotImplementedError, match=problem):
        check_shape(shape)


@needs_pallas
@pytest.mark.parametrize("num_cores", [8, 16])
@pytest.mark.parametrize("format", [None, "fp8", "mxfp4"])
def test_projections_of_the_same_rows_in_one_call(format: str | None, num_cores: int) -> None:
    """The thread blocks of 256 outputs share the inputs on 16 SMs, and do not on 8."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels_pallas.grouped_matmul.gpu.backend import GpuGroupedMatmul

    num_inputs, num_rows = 2048, 20
    matmul = GpuGroupedMatmul(num_cores, plgpu.InterpretGPUParams(detect_races=True))
    rng = np.random.default_rng(8)
    projections: list[tuple[Matrices, np.ndarray]] = []
    for size in (64, 192):
        w = jnp.asarray(rng.standard_normal((3, size, num_inputs)) / num_inputs**0.5, jnp.bfloat16)
        plain = Matrices(w), np.asarray(w, np.float64)
        matrices, w64_XOI = plain if format is None else random_matrices(format, w.shape)
        bias_XO = jnp.asarray(rng.standard_normal((3, size)), jnp.bfloat16)
        projections.append((matrices._replace(bias_XO=bias_XO), w64_XOI))
    x_RI = jnp.asarray(rng.standard_normal((num_rows, num_inputs)), jnp.bfloat16)
    static = projections[0][0].format

    @partial(jax.jit, static_argnames="dtype")
    def run(x_RI: jax.Array, *arrays: Any, dtype: Any) -> list[jax.Array]:
        block_rows = matmul.block_rows(num_rows, 1, ROW_BYTES)
        blocks = Blocks(jnp.ones(1, jnp.int32), jnp.ones(1, jnp.int32))
        x_PI = jnp.pad(x_RI, ((0, block_rows - num_rows), (0, 0)))
        matrices = [Matrices(*each, static, bias) for *each, bias in arrays]
        results = matmul(x_PI, matrices, blocks, out_dtype=dtype)
        return [y_PO[:num_rows] for y_PO in results]

    arrays = [(*matrices[:3], matrices.bias_XO) for matrices, _ in projections]
    for dtype, tolerance in ((None, 0.03), (jnp.float32, 1e-5)):
        for got, (matrices, w64_XOI) in zip(run(x_RI, *arrays, dtype=dtype), projections, strict=True):
            assert got.dtype == (dtype or jnp.bfloat16)
            want = np.asarray(x_RI, np.float64) @ w64_XOI[1].T + np.asarray(matrices.bias_XO, np.float64)[1]
            limit = tolerance if format is None or dtype is None else 0.01  # dequantised weights are rounded
            np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=limit)


@needs_pallas
def test_tiles_occupy_the_gpu() -> None:
    """Few outputs are computed by thread blocks of one warpgroup, and very few by several that share the inputs."""
    from kernels_pallas.grouped_matmul.gpu.tile import choose_tile

    llama, cores = 4096, 132
    assert choose_tile(8, 1, [14336, 14336], llama, None, cores).outputs == 128
    few = choose_tile(8, 1, [llama], llama, None, cores)
    assert (few.outputs, few.splits) == (64, 1)
    very_few = choose_tile(8, 1, [1024, 128, 128], 8192, None, cores)
    assert (very_few.outputs, very_few.splits) == (64, 4)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    num_groups=st.integers(1, 6),
    block_rows=st.sampled_from([1, 4, 16]),
    max_compared=st.sampled_from([0, 1 << 22]),
)
def test_sort_into_blocks_keeps_rows_with_their_group(
    groups: list[int], num_groups: int, block_rows: int, max_compared: int
) -> None:
    group_R = np.minimum(groups, num_groups)
    options = {"max_compared": max_compared}
    blocks, permuted = sort_into_blocks(jnp.asarray(group_R, jnp.int32), num_groups, block_rows, **options)
    group_C, num = np.asarray(blocks.group_C), int(blocks.num_live)
    row_P, block_row_R = np.asarray(permuted.row_P), np.asarray(permuted.block_row_R)
    assert len(row_P) == len(group_C) * block_rows == max_num_blocks(len(groups), num_groups, block_rows) * block_rows
    here = np.flatnonzero(group_R < num_groups)
    np.testing.assert_array_equal(row_P[block_row_R[here]], here)
    np.testing.assert_array_equal(group_C[block_row_R[here] // block_rows], group_R[here])
    assert np.all(block_row_R[group_R == num_groups] == len(row_P))
    # No block is empty, and the blocks of a group are consecutive.
    assert num == sum(-(-np.sum(group_R == group) // block_rows) for group in range(num_groups))
    assert np.all(np.diff(group_C[:num]) >= 0)
    assert set(block_row_R[here] // block_rows) == set(range(num))
    assert np.all(group_C[num:] == group_C[max(num - 1, 0)])


@pytest.mark.parametrize(
    "format", [format if format in ("int4 with zeros", "fp8") else slow(format) for format in FORMATS]
)
@pytest.mark.parametrize("axes", [("heads", "hidden"), ("hidden", "heads"), (None, "hidden")])
@needs_pallas
def test_a_linear_map_split_over_devices(axes: tuple[Any, Any], format: str) -> None:
    """The TPU kernel multiplies by one of three stacked matrices, split by outputs, split by inputs, or replicated."""
    mesh = make_mesh(2)
    matrices, w64_XOI = random_matrices(format, (3, 256, 512))
    ops = LinearOps(implementation("tpu"), mesh, ())
    # Two blocks of rows, the second of which is padded.
    x_TI = jnp.asarray(np.random.default_rng(6).standard_normal((600, 512)), jnp.float32)

    @jax.jit
    def run(x_TI: jax.Array, place: jax.Array, *arrays: Any) -> jax.Array:
        (y_TO,) = multiply(ops, x_TI, [StackedMatrix(Matrices(*arrays, matrices.format), place, axes)])
        return y_TO

    got = run(x_TI, jnp.int32(1), *matrices[:3])
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(x_TI, np.float64) @ w64_XOI[1].T, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("num_tokens", [5, slow(130)])
@pytest.mark.parametrize("name", ["xla", pytest.param("gpu", marks=needs_pallas)])
def test_heads_have_their_own_matrices(name: str, num_tokens: int, transposed: bool) -> None:
    """A head has 128 rows of keys and 128 of values; without 16 heads there are few thread blocks, which share inputs.

    130 tokens are multiplied by portable XLA.
    """
    rng = np.random.default_rng(9)
    stack = jnp.asarray(rng.standard_normal((2, 3 * 256, 512)) / 16, jnp.bfloat16)
    channels = 192 if transposed else 512
    x_TNJ = jnp.asarray(rng.standard_normal((num_tokens, 3, channels)), jnp.bfloat16)
    matmul: HeadMatmul = multiply_heads
    if name == "gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        from kernels_pallas.grouped_matmul.gpu.heads import GpuHeadMatmul

        matmul = GpuHeadMatmul(make_mesh(1), NUM_CORES, plgpu.InterpretGPUParams(detect_races=True))
    first = 0 if transposed else 128

    @jax.jit
    def run(x_TNJ: jax.Array, layer: jax.Array) -> jax.Array:
        return matmul(x_TNJ, HeadMatrices(stack, layer, 256, first, 128), transposed=transposed)

    w64_NRC = np.asarray(stack, np.float64)[1].reshape(3, 256, 512)[:, first : first + 128]
    x64_TNJ = np.asarray(x_TNJ, np.float64)
    want = np.einsum(
        "tnr,nrc->tnc" if transposed else "tnc,nrc->tnr", x64_TNJ[..., : 128 if transposed else 512], w64_NRC
    )
    got = run(x_TNJ, jnp.int32(1))
    assert got.dtype == jnp.bfloat16
    # XLA rounds sums to bf16 on CPU.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.02 if name == "gpu" else 0.1, rtol=2**-7)
