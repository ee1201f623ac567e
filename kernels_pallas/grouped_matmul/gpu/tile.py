"""Tiles of the grouped matmul on Hopper GPUs, and the shared memory that they need.

Dimension key: see `backend`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import NamedTuple

from kernels_pallas.quantized import QuantizedFormat
from kernels_pallas.warpgroup import WARPGROUP_ROWS

# Maximum number of rows in a block: their sums, and those of one scale, are in registers.
MAX_ROWS = 128
# Minimum number of columns of a wgmma product.
MIN_ROWS = 8
# A scale of a block-quantised matrix covers this many inputs and outputs.
SCALE_BLOCK = 128
BLOCK_SCALED = QuantizedFormat("fp8", (SCALE_BLOCK, SCALE_BLOCK))
ROW_SCALED = (QuantizedFormat("fp8", (1, 0)), QuantizedFormat("int8", (1, 0)))

_SMEM_BYTES = 227 * 1024
# Upper bound of the memory for barriers and for the alignment of buffers.
_OVERHEAD = 4096
_MAX_STAGES, _MIN_STAGES = 8, 3
# Columns per step: a row of either operand is then at most 128 bytes, the span of one swizzle.
_PLAIN_COLUMNS = (64, 32, 16)
# Bytes per step of 4-bit matrices; the first that divides a row is used: rows of gpt-oss have 1,440. A row of the other
# operand has as many bf16 of each half: 96 are three spans of a swizzle of 64 bytes. Operands of many rows are larger.
_PACKED_COLUMNS, _PACKED_COLUMNS_OF_MANY = (64, 96, 32), (64, 32)
# 4-bit elements of a row with the same scale: half of the words of a tile of registers.
_SCALED_TOGETHER = 32
# A split of the inputs has at least this many.
_MIN_SPLIT_INPUTS = 512
# A third of the SMs can receive what the memory delivers, from L2, if each has enough copies under way.
_BUSY_SHARE = 3
_ROW_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The tile of one thread block.

    Attributes:
        rows: rows of a block.
        warpgroups: number of warpgroups that multiply; each has 64 outputs.
        columns: columns of the matrix per step, which are bytes of a 4-bit matrix.
        piece: columns that are converted together; they have the same scale.
        stages: steps whose operands are in shared memory at the same time.
        slots: steps whose converted matrix is in shared memory at the same time; 0 if nothing is converted.
        splits: number of thread blocks that share the inputs of a block of rows and outputs.
    """

    rows: int
    warpgroups: int
    columns: int
    piece: int
    stages: int
    slots: int
    splits: int = 1

    @property
    def outputs(self) -> int:
        """Outputs of the thread block."""
        return self.warpgroups * WARPGROUP_ROWS


def multiples(format: QuantizedFormat | None) -> tuple[int, int]:
    """Return the numbers that must divide the inputs and the outputs of a matrix; blocks of scales are square.

    Raises:
        NotImplementedError: the kernel does not support the format.
    """
    if format is None:
        return _PLAIN_COLUMNS[-1], WARPGROUP_ROWS
    if format == BLOCK_SCALED:
        return format.block
    if format in ROW_SCALED:
        return _PLAIN_COLUMNS[0], WARPGROUP_ROWS
    rows, columns = format.block
    if format.per_byte == 2 and rows == 1 and columns % _SCALED_TOGETHER == 0:
        return 2 * _PACKED_COLUMNS[-1], WARPGROUP_ROWS
    raise NotImplementedError(
        f"matrices in {format.element_type} and blocks of {format.block}: the kernel wants {BLOCK_SCALED.element_type} "
        f"in {BLOCK_SCALED.block}, 8 bits with a scale per row, or 4 bits with a scale per {_SCALED_TOGETHER} "
        "elements or a multiple of them"
    )


class Products(NamedTuple):
    """Matrices that are multiplied by the same rows.

    Attributes:
        rows: rows of a block.
        num_blocks: number of blocks.
        outputs: outputs of each matrix.
        num_inputs: inputs of the matrices.
        format: format of quantised matrices.
        out_itemsize: bytes per result.
        quantized_rows: whether rows have the elements of the matrices.
    """

    rows: int
    num_blocks: int
    outputs: Sequence[int]
    num_inputs: int
    format: QuantizedFormat | None
    out_itemsize: int = _ROW_BYTES
    quantized_rows: bool = False


def choose_tile(products: Products, num_cores: int) -> Tile:
    """Choose the tile for products on a device with so many SMs."""
    rows, num_blocks, outputs, num_inputs, format, out_itemsize, quantized_rows = products
    width = 2 * WARPGROUP_ROWS
    # One warpgroup in each of twice as many thread blocks, where these are too few to occupy all SMs.
    narrow = any(size % width for size in outputs) or num_blocks * sum(outputs) // width < num_cores
    warpgroups = 1 if narrow and format != BLOCK_SCALED else 2
    thread_blocks = num_blocks * sum(outputs) // (warpgroups * WARPGROUP_ROWS)
    columns, piece, slots = (SCALE_BLOCK, SCALE_BLOCK, 0) if quantized_rows else _columns(products)
    num_steps = num_inputs // (columns * (1 if format is None else format.per_byte))
    splits = 1
    if _BUSY_SHARE * thread_blocks < num_cores:
        while (
            2 * splits * thread_blocks <= num_cores
            and num_steps % (2 * splits) == 0
            and num_inputs // (2 * splits) >= _MIN_SPLIT_INPUTS
        ):
            splits *= 2
    tile = Tile(rows=rows, warpgroups=warpgroups, columns=columns, piece=piece, stages=0, slots=slots, splits=splits)
    products = products._replace(out_itemsize=4 if splits > 1 else out_itemsize)
    return _with_stages(tile, products, num_steps // splits)


def _columns(products: Products) -> tuple[int, int, int]:
    """Return the columns per step and piece, and the number of slots."""
    num_inputs, format = products.num_inputs, products.format
    if format is not None and format.per_byte == 2:
        num_columns = num_inputs // format.per_byte
        sizes = _PACKED_COLUMNS if products.rows < WARPGROUP_ROWS else _PACKED_COLUMNS_OF_MANY
        columns = next(size for size in sizes if num_columns % size == 0)
        piece = gcd(columns, format.block[1] // format.per_byte)
        # The scales of two pieces are put side by side in a tile of registers, or each has whole tiles.
        return columns, piece if piece % _SCALED_TOGETHER == 0 else _SCALED_TOGETHER // 2, 2
    columns = next(size for size in _PLAIN_COLUMNS if num_inputs % size == 0)
    if format == BLOCK_SCALED:
        # The product of a step is scaled before the next one is multiplied, so one slot suffices.
        return SCALE_BLOCK, columns, 1
    return columns, columns, 0 if format is None else 2


def _with_stages(tile: Tile, products: Products, num_steps: int) -> Tile:
    """Set the number of stages: as many as fit next to a second thread block of the SM, or at least without one."""
    format = products.format
    per_byte, itemsize = (1, _ROW_BYTES) if format is None else (format.per_byte, format.dtype.itemsize)
    columns, row_bytes = tile.columns * per_byte, itemsize if products.quantized_rows else _ROW_BYTES
    stage = tile.outputs * tile.columns * itemsize + tile.rows * columns * row_bytes
    fixed = tile.slots * tile.outputs * columns * _ROW_BYTES + _OVERHEAD
    fixed += tile.rows * tile.outputs * products.out_itemsize
    # The registers of many rows leave no room for a second thread block.
    shares = (2, 1) if tile.rows < WARPGROUP_ROWS else (1,)
    fits = [(_SMEM_BYTES // share - fixed) // stage for share in shares]
    stages = next((each for each in fits if each >= _MIN_STAGES), fits[-1])
    return replace(tile, stages=max(2, min(stages, _MAX_STAGES, num_steps)))
