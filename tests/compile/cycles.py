"""The least cycles that kernels compute for each part of their weights or keys, beside those that memory takes for it.

A warp scheduler of a GPU issues an instruction per cycle, and a TPU core starts a bundle per cycle; both may wait for
results. A kernel whose least cycles are more than those of its memory cannot reach the roofline.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.parallel.mesh import mesh_of
from jaxserve.plan.targets import parse_target, prepare_environment, target_devices
from kernels_pallas.dispatch import attention_tiles, choose_attention, choose_grouped_matmul
from kernels_pallas.grouped_matmul.api import ExpertShape, Matrices
from kernels_pallas.grouped_matmul.gpu.tile import Products, choose_tile
from kernels_pallas.paged_attention.api import AttentionConfig, AttentionMeta
from kernels_pallas.paged_attention.gpu.tile import choose_tile as choose_attention_tile
from kernels_pallas.paged_attention.tpu.layout import TpuLayout
from kernels_pallas.paged_attention.tpu.schedule import share_cores
from kernels_pallas.quantized import QuantizedFormat
from kernels_pallas.token_tiles import Blocks
from tests.compile.machine_code import product_loops, read_bundles

# bf16 elements that a device multiplies per cycle, from which its clock follows.
MULTIPLIED = {"h100": 132 * 4 * 512, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}
# Cores of a device, which share its memory: SMs of a GPU, TensorCores of a TPU.
CORES = {"h100": 132, "v5e": 1, "v5p": 2, "v6e": 1}
# Experts of Qwen3-30B-A3B: gate or up.
NUM_OUTPUTS, NUM_INPUTS, NUM_MATRICES, NUM_BLOCKS = 768, 2048, 16, 8
# The format, the dtype of the scales, and whether there are zero points.
FORMATS: dict[str, tuple[QuantizedFormat | None, str, bool]] = {
    "bf16": (None, "float32", False),
    "fp8 in blocks": (QuantizedFormat("fp8", (128, 128)), "float32", False),
    "fp8 by row": (QuantizedFormat("fp8", (1, 0)), "float32", False),
    "int8 by row": (QuantizedFormat("int8", (1, 0)), "float32", False),
    "mxfp4": (QuantizedFormat("mxfp4", (1, 32)), "uint8", False),
    "int4 with zeros": (QuantizedFormat("int4", (1, 128)), "float32", True),
}
PAGE_SIZE = {"tpu": 128, "gpu": 64}
NUM_ROWS = 32
# Rows of a block on TPU.
_TAKEN_ROWS = 16


class Heads(NamedTuple):
    """Heads of a device.

    Attributes:
        num_q_heads, num_kv_heads, head_dim: sizes of attention.
        value_dim: channels of a key that are its value, in MLA.
        dtype: dtype of the cache.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int | None
    dtype: str


HEADS = {
    "Llama-3.1-8B": Heads(32, 8, 128, None, "bfloat16"),
    "Llama-3.1-8B, fp8 cache": Heads(32, 8, 128, None, "float8_e4m3fn"),
    "DeepSeek-V3.1 on 8 devices": Heads(16, 1, 576, 512, "bfloat16"),
    "DeepSeek-V3.1 on 8 devices, fp8 cache": Heads(16, 1, 576, 512, "float8_e4m3fn"),
}


class Cycles(NamedTuple):
    """Cycles for a part of a kernel's work.

    Attributes:
        compute: the least that the code needs.
        memory: those that memory needs for the part's weights or keys.
    """

    compute: float
    memory: float

    @property
    def ratio(self) -> float:
        """More than 1 if the code and not the memory is the bound."""
        return self.compute / self.memory


@dataclass(frozen=True)
class CycleCase:
    """A kernel on a target.

    Attributes:
        target: the target.
        kernel: `experts` or `decode`.
        name: key of `FORMATS` or `HEADS`.
    """

    target: str
    kernel: str
    name: str

    def lower(self) -> jax.stages.Lowered:
        """Lower the kernel for one device: 8 experts with 16 rows or fewer each, or decode of 32 rows."""
        target = parse_target(self.target)
        prepare_environment(target)
        mesh = mesh_of(target_devices(target), 1, 1)
        return _lower_experts(self, mesh) if self.kernel == "experts" else _lower_decode(self, mesh)


CASES = [
    CycleCase(target, kernel, name)
    for kernel, names in (("experts", FORMATS), ("decode", HEADS))
    for name in names
    for target in ("h100:1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
]
HEADER = """# Least cycles of the kernels

Cycles that a kernel's code needs at least for a part of its weights or keys, beside those that memory takes for their
bytes: the instructions that the schedulers of an SM issue, from SASS, or the bundles of a TPU core, from LLO. Code may
wait longer. Where the ratio is above 1, the code is the bound, and the share of the roofline that
[bytes alone](predicted-shares.md) allow is divided by it.

Experts have blocks of 8 (H100) or 16 rows and 768 outputs of 2,048 inputs; attention decodes rows of one token, without
windows. Clocks follow from the published peaks. No kernel has run on these devices. Written by
`scripts/static_cycles.py`.

| kernel | weights or heads | target | code | memory | ratio |
| --- | --- | --- | --- | --- | --- |
"""


def cycle_row(case: CycleCase, cycles: Cycles) -> str:
    """Return a row of the table."""
    numbers = f"{cycles.compute:,.0f} | {cycles.memory:,.0f} | {cycles.ratio:.2f}"
    return f"{row_head(case)} {numbers} |"


def row_head(case: CycleCase) -> str:
    """Return the first columns of a row."""
    return f"| {case.kernel} | {case.name} | {case.target.partition(':')[0]} |"


def _array(mesh: Mesh) -> Callable[..., jax.ShapeDtypeStruct]:
    sharding = NamedSharding(mesh, PartitionSpec())
    return lambda *shape, dtype="int32": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


def _lower_experts(case: CycleCase, mesh: Mesh) -> jax.stages.Lowered:
    array = _array(mesh)
    format, scale_dtype, zeros = FORMATS[case.name]
    shape = ExpertShape(NUM_OUTPUTS, NUM_INPUTS, jnp.dtype(jnp.bfloat16), format, zeros)
    matmul = choose_grouped_matmul([shape], mesh).impl
    block_rows = matmul.block_rows(2 * NUM_BLOCKS, NUM_MATRICES, 2 * NUM_INPUTS)
    values, scale, zero = array(NUM_MATRICES, NUM_OUTPUTS, NUM_INPUTS, dtype="bfloat16"), None, None
    if format is not None:
        rows, columns = format.block
        of_blocks = (NUM_MATRICES, NUM_OUTPUTS // rows, NUM_INPUTS // (columns or NUM_INPUTS))
        values = array(NUM_MATRICES, NUM_OUTPUTS, NUM_INPUTS // format.per_byte, dtype=str(format.dtype))
        scale, zero = array(*of_blocks, dtype=scale_dtype), array(*of_blocks, dtype="uint8") if zeros else None

    def multiply(x_TI: jax.Array, row_P: jax.Array, arrays: Any, blocks: Blocks) -> jax.Array:
        return matmul(x_TI, [Matrices(*arrays, format)], blocks, row_P=row_P)[0]

    blocks = Blocks(array(NUM_BLOCKS), array(NUM_MATRICES))
    x_TI, row_P = array(64, NUM_INPUTS, dtype="bfloat16"), array(NUM_BLOCKS * block_rows)
    return jax.jit(multiply).lower(x_TI, row_P, (values, scale, zero), blocks)


def _attention_config(case: CycleCase) -> AttentionConfig:
    heads, platform = HEADS[case.name], parse_target(case.target).device.platform
    return AttentionConfig(
        num_layers=2,
        num_q_heads=heads.num_q_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        value_dim=heads.value_dim,
        page_size=PAGE_SIZE[platform],
        num_pages=512,
        dtype=jnp.dtype(heads.dtype),
        scale=heads.head_dim**-0.5,
    )


def _lower_decode(case: CycleCase, mesh: Mesh) -> jax.stages.Lowered:
    array, config, rows = _array(mesh), _attention_config(case), NUM_ROWS
    backend = choose_attention("auto", config, mesh).impl
    meta = AttentionMeta(
        kv_lens_B=array(rows),
        page_table_BM=array(rows, 128),
        cu_q_lens_B1=array(rows + 1),
        distribution_2=array(2),
        slot_mapping_T=array(rows),
        positions_T=array(rows),
    )
    q_TNH, k_TKH = (
        array(rows, heads, config.head_dim, dtype="bfloat16") for heads in (config.num_q_heads, config.num_kv_heads)
    )
    cache = {name: array(*spec.shape, dtype=spec.dtype) for name, spec in backend.cache_spec().items()}

    def attend(q_TNH: jax.Array, k_TKH: jax.Array, cache: Any, layer: jax.Array, meta: AttentionMeta) -> Any:
        return backend.attend(q_TNH, k_TKH, k_TKH, cache, layer, backend.plan(meta))

    return jax.jit(attend, donate_argnums=2).lower(q_TNH, k_TKH, cache, array(), meta)


def count_cycles(case: CycleCase, code: str) -> Cycles:
    """Return the cycles of a step of a loop.

    Args:
        case: the kernel.
        code: its SASS or its final bundles.
    """
    device = parse_target(case.target).device
    clock = device.flops / (2 * MULTIPLIED[device.name])
    compute, num_bytes = (_on_gpu if device.platform == "gpu" else _on_tpu)(case, code)
    return Cycles(compute, num_bytes * CORES[device.name] / device.bytes_per_s * clock)


def _on_gpu(case: CycleCase, code: str) -> tuple[float, int]:
    """Return the cycles that an SM needs for a step of a thread block, and the step's bytes."""
    loops = product_loops(code)
    if case.kernel == "experts":
        format = FORMATS[case.name][0]
        tile = choose_tile(Products(8, NUM_BLOCKS, [NUM_OUTPUTS], NUM_INPUTS, format), CORES["h100"])
        number, num_bytes = tile.warpgroups, tile.outputs * tile.columns * (2 if format is None else 1)
    else:
        config = _attention_config(case)
        tile = choose_attention_tile(config, decode=True)
        token = config.head_dim * (1 if config.value_dim else 2) * jnp.dtype(config.dtype).itemsize
        number, num_bytes = tile.warpgroups, tile.keys * token
    # Each warpgroup has a warp on each of the four schedulers. Warpgroups that do different things have a loop each.
    of_warpgroups = loops * number if len(loops) == 1 else loops
    assert len(of_warpgroups) == number
    issued = sum(loop.instructions for loop in of_warpgroups)
    multiplied = sum(loop.multiplied for loop in of_warpgroups)
    return max(issued, multiplied / (MULTIPLIED["h100"] // CORES["h100"])), num_bytes


def _on_tpu(case: CycleCase, code: str) -> tuple[float, int]:
    """Return the cycles that a core needs for a block of a matrix or a buffer of keys, and its bytes."""
    (grid,) = read_bundles(code).inner
    if case.kernel == "experts":
        format = FORMATS[case.name][0]
        per_byte, itemsize = (1, 2) if format is None else (format.per_byte, 1)
        # The rows of a block are taken from all tokens, once for each half of the bytes.
        trips = [_TAKEN_ROWS] * per_byte
        if format is not None and format.block[0] > 1:
            trips.append(NUM_INPUTS // format.block[1])
        return grid.cycles(*trips), NUM_OUTPUTS * NUM_INPUTS * itemsize // per_byte
    config, target = _attention_config(case), parse_target(case.target)
    mesh = mesh_of(target_devices(target), 1, 1)
    ((tile, *_),) = attention_tiles(config, mesh).values()
    shares = share_cores(CORES[target.device.name], config.num_kv_heads, num_rows=NUM_ROWS)
    heads, pages = config.num_kv_heads // (shares.num_cores if shares.of_heads else 1), tile["pages_per_buffer"]
    token = heads * TpuLayout.of(config).lanes * jnp.dtype(config.dtype).itemsize
    buffer = grid.inner[-1]
    # Two loops start to copy pages, of which one runs, and one waits. The last one is for buffers that are not full, as
    # is most of what may be skipped.
    return buffer.cycles(pages, 0, pages, 0) - buffer.skippable, pages * config.page_size * token


def compile_case(case: CycleCase, folder: Path) -> str:
    """Compile a kernel and return its machine code; for TPUs, in a process of its own, which dumps it."""
    environment = dict(os.environ, MOSAIC_GPU_DUMP_TO=str(folder), MOSAIC_GPU_DUMP_PTXAS="1")
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    environment["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump}"
    command = [sys.executable, "-m", "tests.compile.cycles", case.target, case.kernel, case.name]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    kernel = {"experts": "grouped_matmul", "decode": "paged_decode"}[case.kernel]
    dumps = [*folder.glob(f"{kernel}*.sass_ctrl"), *folder.glob(f"*-{kernel}.*[0-9]-final_bundles.txt")]
    (path,) = dumps
    return path.read_text()


if __name__ == "__main__":
    CycleCase(*sys.argv[1:]).lower().compile()
