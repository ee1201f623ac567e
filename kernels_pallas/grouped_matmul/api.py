"""Grouped matmul: rows times the matrix of their group, such as experts that each have a few of the tokens.

Matrices stay in the stack of all layers, and kernels read a layer's matrices at an offset, like its pages in a KV
cache. Slicing them out of the stack would copy them, including those that no token uses.

Dimension key: T tokens, C blocks (columns in `HeadMatrices`), P rows of all blocks, X matrices, I inputs, O outputs;
for heads: N heads, J channels of a head, R rows of a head's matrices, L layers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
from jax.typing import DTypeLike

from kernels_pallas.quantized import QuantizedFormat, QuantizedMatrix, QuantizedRows, dequantize
from kernels_pallas.token_tiles import Blocks


class ExpertShape(NamedTuple):
    """Shape of the matrices by which one device multiplies; see `Matrices`.

    Attributes:
        num_outputs, num_inputs: numbers of elements, not bytes.
        rows_dtype: dtype of the rows that are multiplied by the matrices.
        format: format of quantised matrices; None if they are not quantised.
        zeros: whether the quantised matrices have zero points.
        transposed: whether the matrices are [I, O].
    """

    num_outputs: int
    num_inputs: int
    rows_dtype: Any
    format: QuantizedFormat | None = None
    zeros: bool = False
    transposed: bool = False


class Matrices(NamedTuple):
    """The right-hand operand of a grouped matmul: stacked matrices, one per group.

    Attributes:
        values_XOI: the matrices.
        scale_Xoi, zero_Xoi: scales and zero points of quantised matrices, as in `QuantizedMatrix`; else None.
        format: format of quantised matrices; else None.
        bias_XO: biases that are added to the results, only if the kernel `adds_bias`; else None.
    """

    values_XOI: jax.Array
    scale_Xoi: jax.Array | None = None
    zero_Xoi: jax.Array | None = None
    format: QuantizedFormat | None = None
    bias_XO: jax.Array | None = None

    def matrix(self, group: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Return one matrix, [O, I], dequantised if it is quantised."""
        take = partial(lax.dynamic_index_in_dim, index=group, keepdims=False)
        if self.scale_Xoi is None or self.format is None:
            return take(self.values_XOI)
        zero_oi = None if self.zero_Xoi is None else take(self.zero_Xoi)
        return dequantize(QuantizedMatrix(take(self.values_XOI), take(self.scale_Xoi), zero_oi), self.format, dtype)


class GroupedMatmul(Protocol):
    """A grouped matmul on one device."""

    @property
    def max_dense_rows(self) -> int:
        """Number of rows up to which a single matrix that is not quantised is better multiplied here than by XLA."""
        ...

    @property
    def max_compared(self) -> int:
        """Argument of `sort_into_blocks`: launches and scatters cost more than comparisons, except on CPU."""
        ...

    @property
    def adds_bias(self) -> bool:
        """Whether the kernel adds biases, before the results are rounded."""
        ...

    def takes_quantized_rows(self, format: QuantizedFormat, num_inputs: int) -> bool:
        """Return whether the kernel multiplies rows that are quantised by matrices of a format and so many inputs."""
        ...

    def block_rows(self, num_rows: int, num_groups: int, row_bytes: int) -> int:
        """Choose the rows per block for `num_rows` rows of `row_bytes` bytes in `num_groups` groups."""
        ...

    def __call__(
        self,
        x: jax.Array | QuantizedRows,
        matrices: Sequence[Matrices],
        blocks: Blocks,
        *,
        row_P: jax.Array | None = None,
        transposed: bool = False,
        out_dtype: DTypeLike | None = None,
    ) -> list[jax.Array]:
        """Compute `x W^T` of each used block with its group's matrix.

        Args:
            x: rows, [P, I] in the order of the blocks; see `sort_into_blocks`. Quantised ones only if the kernel takes
                them.
            matrices: the matrices of all groups, of one or several projections of the same rows, which have the same
                format.
            blocks: the blocks of rows; groups are indices of matrices.
            row_P: i32, the row of `x` in each row of the blocks, if `x` is not in their order: it is then [T, I].
            transposed: whether matrices are [X, I, O]; these are not quantised.
            out_dtype: dtype of the results; x's dtype by default, which quantised rows do not have.

        Returns:
            [P, O] by projection, sums in f32; blocks that are not used hold arbitrary values.
        """
        ...


def take_rows(x: jax.Array | QuantizedRows, row_P: jax.Array | None) -> jax.Array | QuantizedRows:
    """Return the rows in the order of the blocks; see `GroupedMatmul`."""
    if row_P is None:
        return x
    return x.take(row_P) if isinstance(x, QuantizedRows) else x[row_P]


class HeadMatrices(NamedTuple):
    """A matrix of each head, as rows of one stacked matrix.

    Attributes:
        stack: the rows of all heads, [L, N * R, C]; every head has R.
        layer: i32 scalar, the index of the layer.
        head_rows: R.
        first, number: the rows that are the matrix.
    """

    stack: jax.Array
    layer: jax.Array
    head_rows: int
    first: int
    number: int

    def by_head(self) -> jax.Array:
        """Return the matrices of the layer, [N, number, C]."""
        rows = lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)
        return rows.reshape(-1, self.head_rows, rows.shape[-1])[:, self.first : self.first + self.number]


class HeadMatmul(Protocol):
    """Multiplies the heads of activations, each by its own matrix."""

    def __call__(self, x_TNJ: jax.Array, matrices: HeadMatrices, *, transposed: bool = False) -> jax.Array:
        """Return `x W^T` of each head, [T, N, number], in x's dtype.

        Args:
            x_TNJ: activations; the first channels of a head are multiplied, as many as the matrix has columns.
            matrices: the matrices [number, C] of the heads.
            transposed: return `x W` instead, [T, N, C].
        """
        ...
