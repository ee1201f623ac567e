"""Views of GGUF tensors in the layout of Hugging Face's checkpoints: of one tensor, a part of one, or several merged.

Dimension key: E experts, I inputs, O outputs, N heads, C latent dim, H key head dim, V value head dim.
"""

from typing import NamedTuple, Protocol

import numpy as np
from gguf import ReaderTensor
from gguf.quants import dequantize

from checkpoints.source import CheckpointError, Index


class View(Protocol):
    """A tensor in the layout of Hugging Face's checkpoints."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions, outermost first; GGUF lists them innermost first."""
        ...

    def read(self, index: Index) -> np.ndarray:
        """Read part of the tensor as f32; leading rows outside the index are not touched."""
        ...


def shape_of(tensor: ReaderTensor) -> tuple[int, ...]:
    """Return the dimensions of a tensor, outermost first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def dequantized(tensor: ReaderTensor, *index: slice) -> np.ndarray:
    """Dequantise leading entries to f32; a vector is read whole, because its data may be bytes."""
    data = tensor.data[index] if len(tensor.shape) > 1 else tensor.data
    try:
        values = dequantize(data, tensor.tensor_type)
    except NotImplementedError:
        raise CheckpointError(
            f"tensor {tensor.name} has type {tensor.tensor_type.name}, which is not supported"
        ) from None
    return values.reshape(*data.shape[:-1], shape_of(tensor)[-1])


class Whole(NamedTuple):
    """One whole tensor.

    Attributes:
        tensor: tensor in the file.
        num_heads: number of heads if the file stores the rows of rotary pairs (i, i + H/2) as neighbours, else 0.
        shift: constant that was added to the values in the file.
    """

    tensor: ReaderTensor
    num_heads: int = 0
    shift: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return shape_of(self.tensor)

    def read(self, index: Index) -> np.ndarray:
        """See `View`."""
        num_rows, *rest = self.shape
        start, end, _ = index[0].indices(num_rows)
        # Rotary dimensions are reordered within a head, so whole heads are read.
        block = num_rows // self.num_heads if self.num_heads else 1
        block = block if rest else num_rows
        first, last = start // block * block, -(-end // block) * block
        values = dequantized(self.tensor, slice(first, last)) - np.float32(self.shift)
        if self.num_heads:
            values = _unpermute(values, (last - first) * self.num_heads // num_rows)
        return values[(slice(start - first, end - first), *index[1:])]


class OfExpert(NamedTuple):
    """The matrix of one expert, from a tensor that contains all experts."""

    tensor: ReaderTensor
    expert: int

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return shape_of(self.tensor)[1:]

    def read(self, index: Index) -> np.ndarray:
        """See `View`."""
        matrix = dequantized(self.tensor, slice(self.expert, self.expert + 1), index[0])
        return matrix[(0, slice(None), *index[1:])]


class Transposed(NamedTuple):
    """The matrices of all experts, [E, I, O] from [E, O, I]."""

    tensor: ReaderTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        num_experts, num_outputs, num_inputs = shape_of(self.tensor)
        return num_experts, num_inputs, num_outputs

    def read(self, index: Index) -> np.ndarray:
        """See `View`."""
        return dequantized(self.tensor, index[0]).swapaxes(1, 2)[(slice(None), *index[1:])]


class GateAndUp(NamedTuple):
    """Interleaved gate and up projections of all experts: [E, I, 2 O] of matrices [E, O, I], [E, 2 O] of biases."""

    gate: ReaderTensor
    up: ReaderTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        num_experts, num_outputs, *num_inputs = shape_of(self.gate)
        return num_experts, *num_inputs, 2 * num_outputs

    def read(self, index: Index) -> np.ndarray:
        """See `View`."""
        both = np.stack([dequantized(each, index[0]) for each in self], axis=2)
        both = both.reshape(both.shape[0], -1, *both.shape[3:])
        return (both.swapaxes(1, 2) if both.ndim > 2 else both)[(slice(None), *index[1:])]


class Expansion(NamedTuple):
    """MLA's up-projection of latents to keys and values, [N * (H + V), C] from [N, C, H] and [N, V, C]."""

    keys: ReaderTensor
    values: ReaderTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        (num_heads, latent_dim, key_dim), (_, value_dim, _) = map(shape_of, self)
        return num_heads * (key_dim + value_dim), latent_dim

    def read(self, index: Index) -> np.ndarray:
        """See `View`; the whole tensor is read, which is small."""
        keys_NCH, values_NVC = map(dequantized, self)
        return np.concatenate([keys_NCH.swapaxes(1, 2), values_NVC], axis=1).reshape(self.shape)[index]


def _unpermute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of rotary dimensions, which stores the pairs (i, i + H/2) as neighbours."""
    rows, *rest = values.shape
    paired = values.reshape(num_heads, rows // num_heads // 2, 2, *rest)
    return paired.swapaxes(1, 2).reshape(values.shape)
