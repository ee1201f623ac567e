"""The GPU kernels keep to registers and use the tensor cores, according to NVIDIA's assembler."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.config import LoraConfig
from jaxserve.parallel.mesh import mesh_of
from jaxserve.plan.targets import parse_target, target_devices
from jaxserve.runner.buckets import ForwardShape, SampleShape
from jaxserve.runner.programs import StepPrograms
from kernels_pallas.dispatch import choose_attention
from kernels_pallas.grouped_matmul.api import Matrices
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionConfig, AttentionMeta, Cache
from kernels_pallas.quantized import QuantizedFormat, QuantizedRows
from kernels_pallas.sampling.api import SamplingMode
from kernels_pallas.token_tiles import Blocks
from tests.compile.steps import layout_for

if jax.__version_info__ >= (0, 11):
    from kernels_pallas.grouped_matmul.gpu.backend import GpuGroupedMatmul
    from tests.support.outcomes import compile_program, program_key
    from tests.support.tma import address_problems, copy_problems, count_copies

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")

NUM_TOKENS, NUM_ROWS, NUM_PAGES, NUM_Q_HEADS, NUM_KV_HEADS = 256, 32, 16, 16, 4
_COMMON = {(64, 1, "bfloat16", 16), (80, 3, "int8", 64), (128, 8, "bfloat16", 64), (576, 1, "float8_e4m3fn", 64)}
# The kernels read and convert both 8-bit dtypes in the same places.
_ALIKE = [(64, "int8"), (80, "float8_e4m3fn"), (96, "int8"), (128, "float8_e4m3fn"), (256, "int8")]
CASES = [
    pytest.param(head_dim, dtype, marks=[pytest.mark.slow] * ((head_dim, dtype) in _ALIKE))
    for head_dim in (64, 80, 96, 128, 256)
    for dtype in ("bfloat16", "int8", "float8_e4m3fn")
]
# With 256 columns of results in registers and 8-bit elements to convert, prefill spills the addresses of its stages.
# They are read back once per block of keys, some twenty loads among thousands of instructions.
MOST_SPILLED = {(256, "int8"): 128, (256, "float8_e4m3fn"): 128}


class Heads(NamedTuple):
    """Sizes of attention on one device.

    Attributes:
        head_dim: channels of a key.
        num_kv_heads: key heads, each of which has four query heads.
        value_dim: channels of a key that are its value, in MLA.
    """

    head_dim: int
    num_kv_heads: int = NUM_KV_HEADS
    value_dim: int | None = None


def lower_attention(heads: Heads, dtype: str, page_size: int = 64) -> jax.stages.Lowered:
    """Lower attention with all options, for one H100."""
    head_dim, num_kv_heads, value_dim = heads
    num_q_heads = num_kv_heads * NUM_Q_HEADS // NUM_KV_HEADS
    mesh = mesh_of(target_devices(parse_target("h100:1")), 1, 1)
    sharding = NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    config = AttentionConfig(
        num_layers=2,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        page_size=page_size,
        num_pages=64,
        dtype=jnp.dtype(dtype),
        scale=head_dim**-0.5,
        window=100,
        soft_cap=30.0,
    )
    backend: AttentionBackend = choose_attention("gpu", config, mesh).impl
    meta = AttentionMeta(
        kv_lens_B=array((NUM_ROWS,)),
        page_table_BM=array((NUM_ROWS, NUM_PAGES)),
        cu_q_lens_B1=array((NUM_ROWS + 1,)),
        distribution_2=array((2,)),
        slot_mapping_T=array((NUM_TOKENS,)),
        positions_T=array((NUM_TOKENS,)),
    )
    q_TNH, k_TKH = (array((NUM_TOKENS, heads, head_dim), "bfloat16") for heads in (num_q_heads, num_kv_heads))
    cache = {name: array(spec.shape, spec.dtype) for name, spec in backend.cache_spec().items()}
    sinks_N = array((num_q_heads,), "float32")

    def attend(new: tuple[jax.Array, ...], cache: Cache, layer: jax.Array, meta: AttentionMeta, sinks: Any) -> Any:
        return backend.attend(*new, cache, layer, backend.plan(meta), sinks)

    return jax.jit(attend).lower((q_TNH, k_TKH, k_TKH), cache, array(()), meta, sinks_N)


class Kernel(NamedTuple):
    """The assembler's report on one kernel.

    Attributes:
        name: name of the kernel, as in a profile.
        spilled_bytes: the largest of its stack frame, spill stores and spill loads.
        loads_locals: whether its machine code reads or writes local memory.
        uses_tensor_cores: whether it has warpgroup matmul instructions.
    """

    name: str
    spilled_bytes: int
    loads_locals: bool
    uses_tensor_cores: bool


def _dumped(folder: Path) -> Iterator[Kernel]:
    """Yield the kernels that were dumped to a folder."""
    for path in sorted(folder.glob("*.ptxas")):
        spilled = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", path.read_text())
        assert spilled, path.read_text()
        code = path.with_suffix(".sass_ctrl").read_text()
        locals_ = re.search(r"\b(LDL|STL)\b", code) is not None
        yield Kernel(path.stem.rsplit("_", 1)[0], max(map(int, spilled)), locals_, "HGMMA" in code or "QGMMA" in code)


Assemble = Callable[[jax.stages.Lowered], list[Kernel]]


@pytest.fixture
def assemble(outcomes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Assemble:
    """A function that compiles a program and returns the kernels that no earlier program of this process had."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def assemble(lowered: jax.stages.Lowered) -> list[Kernel]:
        def measure() -> list[Kernel]:
            compile_program(lowered)
            return list(_dumped(tmp_path))

        return [Kernel(*fields) for fields in outcomes.get(f"kernels-{program_key(lowered)}", measure)]

    return assemble


# Takes a program, its number of kernels, and the least number of their copies.
CheckCopies = Callable[[jax.stages.Lowered, int, int], None]


@pytest.fixture
def check_copies(outcomes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckCopies:
    """Compile a program and check its copies; on a device, a mistake faults or hangs.

    The rules are about shared addresses, boxes, strides and the bytes that barriers expect.
    """
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))

    def check(lowered: jax.stages.Lowered, num_kernels: int, num_copies: int) -> None:
        def lint() -> tuple[list[str], int, list[str]]:
            compile_program(lowered)
            mlir = {path.name: path.read_text() for path in tmp_path.glob("*.after_layout_inference.txt")}
            # A kernel that is the same in an earlier program of this process is not compiled again.
            ptx = [path.read_text() for path in tmp_path.glob("*.ptx")]
            problems = [each for text in mlir.values() for each in copy_problems(text)]
            problems += [each for text in ptx for each in address_problems(text)]
            return sorted(mlir), sum(map(count_copies, mlir.values())), problems

        kernels, found, problems = outcomes.get(f"tma-{program_key(lowered)}", lint)
        assert len(kernels) == num_kernels
        assert found >= num_copies
        assert not problems

    return check


@pytest.mark.parametrize(("head_dim", "dtype"), CASES)
def test_attention_keeps_to_registers_and_uses_the_tensor_cores(head_dim: int, dtype: str, assemble: Assemble) -> None:
    kernels = {kernel.name: kernel for kernel in assemble(lower_attention(Heads(head_dim), dtype))}
    for name, kernel in kernels.items():
        most = MOST_SPILLED.get((head_dim, dtype), 0) if name == "paged_prefill" else 0
        assert kernel.spilled_bytes <= most, kernel
        assert most or not kernel.loads_locals, kernel
        assert kernel.uses_tensor_cores == name.startswith("paged"), name
    # The kernel that writes keys and values is the same in several cases, and compiled once.
    assert kernels.keys() >= {"paged_decode", "paged_prefill"}


LATENT = Heads(576, 1, 512)
# One case for each way in which a kernel lays out a token's heads, and the whole product.
COPIES = [
    pytest.param(heads, dtype, page_size, marks=[pytest.mark.slow] * ((*heads[:2], dtype, page_size) not in _COMMON))
    for heads in (*(Heads(dim, number) for dim in (64, 80, 96, 128, 256) for number in (1, 2, 3, 8)), LATENT)
    for dtype in ("bfloat16", "int8", "float8_e4m3fn")
    for page_size in (16, 64, 256)
]


@pytest.mark.parametrize(("heads", "dtype", "page_size"), COPIES)
def test_copies_keep_the_rules_of_tma(heads: Heads, dtype: str, page_size: int, check_copies: CheckCopies) -> None:
    """At least one copy for keys, one for queries and one for results in each of the kernels that have them."""
    check_copies(lower_attention(heads, dtype, page_size), 4, 9)


FORMATS = {
    "bf16": None,
    "fp8": QuantizedFormat("fp8", (128, 128)),
    "fp8 by row": QuantizedFormat("fp8", (1, 0)),
    "mxfp4": QuantizedFormat("mxfp4", (1, 32)),
    "int4 with zeros": QuantizedFormat("int4", (1, 128)),
}
# With rows as they are, and with rows that are quantised as the matrices are.
PRODUCTS = [(name, False) for name in FORMATS if name != "fp8 by row"] + [("fp8", True), ("fp8 by row", True)]


def lower_products(name: str, block_rows: int, *, quantized_rows: bool) -> jax.stages.Lowered:
    """Lower five blocks of rows times experts' matrices of 256 outputs and 512 inputs."""
    sharding = NamedSharding(mesh_of(target_devices(parse_target("h100:1")), 1, 1), PartitionSpec())

    def array(shape: tuple[int, ...], dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    num_rows = 5 * block_rows
    matrices, rows = Matrices(array((8, 256, 512), "bfloat16")), array((num_rows, 512), "bfloat16")
    if (format := FORMATS[name]) is not None:
        columns = format.block[1] or 512
        values = array((8, 256, 512 // format.per_byte), str(format.dtype))
        blocks_shape = (8, 256 // format.block[0], 512 // columns)
        scale = array(blocks_shape, "uint8" if name == "mxfp4" else "float32")
        zero = array(blocks_shape, "uint8") if name == "int4 with zeros" else None
        matrices = Matrices(values, scale, zero, format)
        if quantized_rows:
            elements = array((num_rows, 512), str(format.dtype))
            rows = QuantizedRows(elements, array((512 // columns, num_rows), "float32"))

    def multiply(rows: Any, arrays: tuple[jax.Array | None, ...], blocks: Blocks) -> jax.Array:
        return GpuGroupedMatmul(132)(rows, [Matrices(*arrays, format)], blocks, out_dtype=jnp.bfloat16)[0]

    return jax.jit(multiply).lower(rows, matrices[:3], Blocks(array((5,)), array((1,))))


@pytest.mark.parametrize("block_rows", [8, 128])
@pytest.mark.parametrize(("name", "quantized_rows"), PRODUCTS)
def test_experts_keep_to_registers_and_use_the_tensor_cores(
    name: str, quantized_rows: bool, block_rows: int, assemble: Assemble
) -> None:
    (kernel,) = assemble(lower_products(name, block_rows, quantized_rows=quantized_rows))
    assert kernel.name == "grouped_matmul"
    assert kernel.uses_tensor_cores
    assert not kernel.spilled_bytes


def test_thread_blocks_that_share_the_inputs_add_up_in_one_launch(
    assemble: Assemble, check_copies: CheckCopies
) -> None:
    """Three matrices of 256 outputs occupy few SMs."""
    sharding = NamedSharding(mesh_of(target_devices(parse_target("h100:1")), 1, 1), PartitionSpec())

    def array(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    def multiply(rows: jax.Array, stacks: list[jax.Array], blocks: Blocks) -> list[jax.Array]:
        return GpuGroupedMatmul(132)(rows, [Matrices(stack) for stack in stacks], blocks)

    rows, stacks = array(8, 4096, dtype="bfloat16"), [array(3, size, 4096, dtype="bfloat16") for size in (64, 64, 128)]
    lowered = jax.jit(multiply).lower(rows, stacks, Blocks(array(1), array(1)))
    kernels = assemble(lowered)
    assert {kernel.name for kernel in kernels} == {"grouped_matmul", "add_splits"}
    assert not any(kernel.spilled_bytes for kernel in kernels)
    # The rows and each matrix, and the sums and results of each matrix.
    check_copies(lowered, 2, 8)


@pytest.mark.parametrize("block_rows", [8, 128])
@pytest.mark.parametrize(("name", "quantized_rows"), PRODUCTS)
def test_copies_of_products_keep_the_rules_of_tma(
    name: str, quantized_rows: bool, block_rows: int, check_copies: CheckCopies
) -> None:
    """The rows, the matrix, and the results."""
    check_copies(lower_products(name, block_rows, quantized_rows=quantized_rows), 1, 3)


@pytest.mark.slow
def test_kernels_of_a_step_with_adapters_keep_to_registers(assemble: Assemble) -> None:
    """The kernels are those of adapters for every linear map, of sampling and of attention, at a real model's sizes."""
    lora = LoraConfig(max_rank=16, target_modules=("all",))
    sizes = {"context_length": 8192, "max_running_requests": 8, "chunked_prefill_size": 32}
    engine, _ = layout_for("h100:1", "qwen3-4b", 1, lora=lora, **sizes)
    step = StepPrograms(engine.step)
    kernels: list[Kernel] = []
    for lowered in (
        step.lower_forward(ForwardShape(engine.step.buckets[0], adapted=True)),
        *(step.lower_sample(SampleShape(engine.scheduler.max_rows, mode)) for mode in SamplingMode),
    ):
        kernels += assemble(lowered)
    assert {kernel.name for kernel in kernels} >= {
        "kv_update", "paged_decode", "paged_prefill", "lora_shrink", "lora_expand"
    }  # fmt: skip
    for kernel in kernels:
        assert not kernel.spilled_bytes, kernel
        assert not kernel.loads_locals, kernel
        assert kernel.uses_tensor_cores == kernel.name.startswith(("paged", "lora")), kernel
