"""Grouped matmuls against numpy in float64; the Pallas kernels run in interpret mode, with race detection."""

import itertools
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
from kernels_pallas.grouped_matmul.api import ExpertShape, GroupedMatmul, Matrices
from kernels_pallas.grouped_matmul.cases import (
    SPREADS,
    GroupedCase,
    HeadCase,
    Spread,
    evenly,
    grouped_case,
    half_elsewhere,
    head_case,
    random_matrices,
)
from kernels_pallas.grouped_matmul.xla.backend import XlaGroupedMatmul
from kernels_pallas.grouped_matmul.xla.heads import multiply_heads
from kernels_pallas.quantized import QuantizedFormat, quantize_rows
from kernels_pallas.token_tiles import Blocks, max_num_blocks, sort_into_blocks
from tests.support.kernels import KERNELS, interpreted, needs_pallas
from tests.support.marks import slow

# SMs of the GPU for which tiles are chosen.
NUM_CORES = 16
BF16 = jnp.dtype(jnp.bfloat16)


def implementation(name: str, shape: ExpertShape | None = None) -> GroupedMatmul:
    return XlaGroupedMatmul() if name == "xla" else interpreted(name, num_cores=NUM_CORES).grouped_matmul(shape)


def check(name: str, group_R: np.ndarray, num_groups: int, shape: ExpertShape, scale_dtype: Any = jnp.float32) -> None:
    case = GroupedCase(shape=shape, num_groups=num_groups, group_R=group_R, scale_dtype=scale_dtype)
    step = grouped_case(implementation(name, shape), case)
    step.verify(jax.jit(step.run)(*step.arguments))


@pytest.mark.parametrize(
    ("num_blocks", "num_outputs", "want"), [(1, 5120, (8, 640)), (1, 128, (1, 128)), (4, 5120, (7, 768))]
)
@needs_pallas
def test_a_single_block_is_shared_by_its_outputs(num_blocks: int, num_outputs: int, want: tuple[int, int]) -> None:
    """Rows of 5,120 bytes make blocks of 768 outputs, of which there are seven."""
    from kernels_pallas.grouped_matmul.tpu.launch import choose_grid

    grid = choose_grid(num_blocks, num_outputs, 5120, 2)
    assert (grid.num_outputs, grid.block_outputs) == want
    assert grid.num_cores == (1 if num_outputs == 128 else 2)


@pytest.mark.parametrize("spread", SPREADS.values())
@pytest.mark.parametrize("sizes", [(64, 128), (384, 64)])
@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_grouped_matmul_matches_numpy(name: str, sizes: tuple[int, int], spread: Spread) -> None:
    check(name, spread(5, 200), 5, ExpertShape(*sizes, BF16))


@pytest.mark.parametrize(
    ("num_groups", "num_rows", "sizes"),
    [
        pytest.param(5, 200, (256, 64), id="outputs"),
        pytest.param(5, 200, (64, 128), id="blocks"),
        pytest.param(3, 20, (64, 128), id="an odd number of blocks"),
        pytest.param(1, 10, (256, 128), id="outputs of one block"),
        pytest.param(1, 10, (64, 128), id="nothing"),
        pytest.param(1, 10, (384, 128), id="a partial last block"),
    ],
)
@pytest.mark.parametrize("format", [None, "fp8 in blocks"])
@needs_pallas
def test_two_cores_of_a_tpu_share(num_groups: int, num_rows: int, sizes: tuple[int, int], format: str | None) -> None:
    if format is not None and sizes[0] % 128 + sizes[1] % 128:
        pytest.skip("blocks of 128 inputs and outputs")
    shape = ExpertShape(*sizes, BF16, None if format is None else FORMATS[format][0])
    case = GroupedCase(shape=shape, num_groups=num_groups, group_R=evenly(num_groups, num_rows))
    step = grouped_case(interpreted("tpu", tpu_cores=2).grouped_matmul(), case)
    step.verify(jax.jit(step.run)(*step.arguments))


@pytest.mark.parametrize(
    ("sizes", "transposed"), [((16, 128), False), ((48, 64), False), ((192, 16), True), ((64, 96), True)]
)
@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_lora_matrices(name: str, sizes: tuple[int, int], transposed: bool) -> None:
    """Ranks from 16 on: they are the outputs of an A matrix and the inputs of a B matrix, which is stored [in, out]."""
    check(name, half_elsewhere(6, 70), 6, ExpertShape(*sizes, BF16, transposed=transposed))


@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_fewer_rows_than_groups(name: str) -> None:
    check(name, evenly(40, 12), 40, ExpertShape(128, 64, BF16))


# With the dtype of the scales, and whether there are zero points.
FORMATS = {
    "fp8 in blocks": (QuantizedFormat("fp8", (128, 128)), jnp.float32, False),
    "mxfp4": (QuantizedFormat("mxfp4", (1, 32)), jnp.uint8, False),
    "int4": (QuantizedFormat("int4", (1, 32)), jnp.bfloat16, False),
    "int4 with zeros": (QuantizedFormat("int4", (1, 64)), jnp.float32, True),
    "int4 of 128": (QuantizedFormat("int4", (1, 128)), jnp.float16, False),
    "int4 by row": (QuantizedFormat("int4", (1, 0)), jnp.float32, False),
    "int8": (QuantizedFormat("int8", (1, 0)), jnp.float32, False),
    "fp8": (QuantizedFormat("fp8", (1, 0)), jnp.float32, False),
}


def matrices_of(format: str, shape: tuple[int, int, int]) -> tuple[Matrices, np.ndarray]:
    kind, scale_dtype, zeros = FORMATS[format]
    return random_matrices(shape, kind, zeros=zeros, scale_dtype=scale_dtype)


@pytest.mark.parametrize("sizes", [(128, 384), (384, 128)])
@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_matrices_of_8_bits(name: str, sizes: tuple[int, int]) -> None:
    check(name, evenly(4, 90), 4, ExpertShape(*sizes, BF16, FORMATS["fp8 in blocks"][0]))


@pytest.mark.parametrize("dtype", [BF16, slow(jnp.dtype(jnp.float32))])
@pytest.mark.parametrize("format", list(FORMATS)[1:])
@pytest.mark.parametrize("name", ["xla", KERNELS[0]])
def test_matrices_with_scales_of_groups(name: str, format: str, dtype: Any) -> None:
    """A row of 192 4-bit inputs has 96 bytes, which is fewer than a vector has lanes."""
    kind, scale_dtype, zeros = FORMATS[format]
    check(name, evenly(3, 40), 3, ExpertShape(136, 192, dtype, kind, zeros), scale_dtype)


@needs_pallas
@pytest.mark.parametrize("sizes", [(64, 192), slow((256, 256))])
@pytest.mark.parametrize("format", list(FORMATS)[1:])
def test_matrices_with_scales_of_groups_on_gpu(format: str, sizes: tuple[int, int]) -> None:
    """A step takes 48 or 64 bytes of a row of 4-bit elements, and 16, 32, 48 or 64 of them share a scale."""
    kind, scale_dtype, zeros = FORMATS[format]
    check("gpu", evenly(3, 70), 3, ExpertShape(*sizes, BF16, kind, zeros), scale_dtype)


@needs_pallas
@pytest.mark.parametrize("num_rows", [slow(20), 200])
@pytest.mark.parametrize(
    ("name", "format"), [*itertools.product(("gpu", "tpu"), ("fp8 in blocks", "fp8")), ("tpu", "int8")]
)
def test_quantised_rows(name: str, format: str, num_rows: int) -> None:
    """Rows and matrices have the same elements, which are multiplied without being converted."""
    shape = ExpertShape(256, 384, BF16, FORMATS[format][0])
    case = GroupedCase(shape=shape, num_groups=3, group_R=half_elsewhere(3, num_rows), quantized_rows=True)
    step = grouped_case(implementation(name), case)
    step.verify(jax.jit(step.run)(*step.arguments))


@needs_pallas
@pytest.mark.slow
def test_a_cut_block_of_8_bits() -> None:
    """2,176 outputs of 4,096 inputs make two blocks of 1,024 outputs and one of 128."""
    check("tpu", evenly(2, 20), 2, ExpertShape(2176, 4096, BF16, FORMATS["fp8 in blocks"][0]))


@needs_pallas
def test_tpus_take_any_size_and_float32() -> None:
    """The outputs make several blocks, the last of which is partial, and the inputs are no multiple of 128."""
    check("tpu", evenly(3, 20), 3, ExpertShape(300, 8200, jnp.dtype(jnp.float32)))


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
@pytest.mark.parametrize("sizes", [(64, 192), (64, 64, 128)])
@pytest.mark.parametrize("num_cores", [slow(8), 16])
@pytest.mark.parametrize("format", [None, "fp8", "mxfp4"])
def test_projections_of_the_same_rows_in_one_call(format: str | None, num_cores: int, sizes: tuple[int, ...]) -> None:
    """Thread blocks of 256 outputs share the inputs on 16 SMs, not on 8. The sums of three are added in a kernel."""
    num_inputs, num_rows = 2048, 20
    matmul = interpreted("gpu", num_cores=num_cores).grouped_matmul()
    rng = np.random.default_rng(8)
    projections: list[tuple[Matrices, np.ndarray]] = []
    for size in sizes:
        w = jnp.asarray(rng.standard_normal((3, size, num_inputs)) / num_inputs**0.5, jnp.bfloat16)
        plain = Matrices(w), np.asarray(w, np.float64)
        matrices, w64_XOI = plain if format is None else matrices_of(format, w.shape)
        bias_XO = jnp.asarray(rng.standard_normal((3, size)), jnp.bfloat16)
        projections.append((matrices._replace(bias_XO=bias_XO), w64_XOI))
    x_RI = jnp.asarray(rng.standard_normal((num_rows, num_inputs)), jnp.bfloat16)
    static = projections[0][0].format

    @partial(jax.jit, static_argnames="dtype")
    def run(x_RI: jax.Array, *arrays: Any, dtype: Any) -> list[jax.Array]:
        block_rows = matmul.block_rows(num_rows, 1, 2 * num_inputs)
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
    from kernels_pallas.grouped_matmul.gpu.tile import Products, choose_tile

    llama, cores = 4096, 132
    assert choose_tile(Products(8, 1, [14336, 14336], llama, None), cores).outputs == 128
    few = choose_tile(Products(8, 1, [llama], llama, None), cores)
    assert (few.outputs, few.splits) == (64, 1)
    very_few = choose_tile(Products(8, 1, [1024, 128, 128], 8192, None), cores)
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
    "format", [format if format in ("int4 with zeros", "fp8") else slow(format) for format in list(FORMATS)[1:]]
)
@pytest.mark.parametrize("axes", [("heads", "hidden"), ("hidden", "heads"), (None, "hidden")])
@needs_pallas
def test_a_linear_map_split_over_devices(axes: tuple[Any, Any], format: str) -> None:
    """The TPU kernel multiplies by one of three stacked matrices, split by outputs, split by inputs, or replicated."""
    mesh = make_mesh(2)
    matrices, w64_XOI = matrices_of(format, (3, 256, 512))
    ops = LinearOps(implementation("tpu"), mesh, ())
    # Two blocks of rows, the second of which is padded.
    x_TI = jnp.asarray(np.random.default_rng(6).standard_normal((600, 512)), jnp.float32)

    @jax.jit
    def run(x_TI: jax.Array, place: jax.Array, *arrays: Any) -> jax.Array:
        (y_TO,) = multiply(ops, x_TI, [StackedMatrix(Matrices(*arrays, matrices.format), place, axes)])
        return y_TO

    got = run(x_TI, jnp.int32(1), *matrices[:3])
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(x_TI, np.float64) @ w64_XOI[1].T, atol=1e-5)


@pytest.mark.parametrize("axes", [("heads", "hidden"), ("hidden", "heads")])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_linear_map_of_quantised_activations(axes: tuple[Any, Any], format: str) -> None:
    """Split inputs are quantised on each device. Few tokens stay exact."""
    mesh = make_mesh(2)
    matrices, w64_XOI = matrices_of(format, (3, 64, 128))
    ops = LinearOps(XlaGroupedMatmul(), mesh, (), "xla")
    x_TI = jnp.asarray(np.random.default_rng(6).standard_normal((130, 128)), jnp.float32)
    kind = FORMATS[format][0]

    @jax.jit
    def run(x_TI: jax.Array, place: jax.Array, *arrays: Any) -> jax.Array:
        (y_TO,) = multiply(ops, x_TI, [StackedMatrix(Matrices(*arrays, matrices.format), place, axes)])
        return y_TO

    parts = [x_TI] if axes[0] == "heads" else [x_TI[:, :64], x_TI[:, 64:]]
    rows = [quantize_rows(part, kind) for part in parts]
    dequantized = [np.asarray(each.values_TI, np.float64) * np.asarray(each.scale_iT, np.float64).T for each in rows]
    want = np.concatenate(dequantized, axis=1) @ w64_XOI[1].T
    got = np.asarray(run(x_TI, jnp.int32(1), *matrices[:3]), np.float64)
    np.testing.assert_allclose(got, want, atol=1e-5)
    exact = np.asarray(x_TI, np.float64) @ w64_XOI[1].T
    # A rounded element is off by up to a half of 1 / 127 of its row's largest, or by 1 / 16 of itself.
    assert 1e-4 < np.abs(got - exact).max() < 0.2
    few = np.asarray(run(x_TI[:128], jnp.int32(1), *matrices[:3]), np.float64)
    np.testing.assert_allclose(few, exact[:128], atol=1e-5)


def test_rows_of_zeros_are_quantised_to_zeros() -> None:
    for format in (QuantizedFormat("int8", (1, 0)), QuantizedFormat("fp8", (128, 128))):
        rows = quantize_rows(jnp.zeros((2, 256), jnp.bfloat16), format)
        assert not np.asarray(rows.values_TI, np.float32).any()
        assert np.isfinite(np.asarray(rows.scale_iT)).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("num_tokens", [5, slow(130)])
@pytest.mark.parametrize("name", ["xla", KERNELS[1]])
def test_heads_have_their_own_matrices(name: str, num_tokens: int, transposed: bool) -> None:
    """A head has 128 rows of keys and 128 of values; without 16 heads there are few thread blocks, which share inputs.

    130 tokens are multiplied by portable XLA.
    """
    matmul = multiply_heads if name == "xla" else interpreted(name, num_cores=NUM_CORES).head_matmul()
    channels = 192 if transposed else 512
    case = HeadCase(
        num_tokens=num_tokens, num_heads=3, num_rows=128, num_columns=512, num_channels=channels, transposed=transposed
    )
    step = head_case(matmul, case, atol=0.1 if name == "xla" else 0.02)
    step.verify(jax.jit(step.run)(*step.arguments))
