"""Flax NNX building blocks. They name the parameter tree and its logical axes and hold the plain maths.

Weights keep Hugging Face's orientation, [out, in]: nothing is transposed while loading, and it is the faster one
for XLA on CPU. Products accumulate in f32 and return the activations' dtype; norms run in f32.

Logical axes: `vocab`, `hidden`, `heads` (query heads x head dim), `kv_heads`, `mlp`, `experts`,
`experts_shared`, `expert_mlp`, `layers`; None is replicated.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxserve.config import QuantizationConfig
from jaxserve.layers.quantized_linear import LinearOps, multiply
from kernels_pallas.grouped_matmul.api import Matrices
from kernels_pallas.quantized import QuantizedFormat

Axes: TypeAlias = tuple[str | None, ...]
# What a model's config calls the dtypes of factors.
_SCALE_DTYPES: Mapping[str, jnp.dtype] = {"e8m0": jnp.dtype(jnp.uint8)}
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
# What adapters add to the result of a module; set while a step is traced.
Update: TypeAlias = Callable[[jax.Array], jax.Array]


class InStack(NamedTuple):
    """A layer's weight that is not cut out of the stack of all layers.

    Attributes:
        stack: with the layers that have such a weight along axis 0.
        place: i32 scalar, this layer's.
    """

    stack: jax.Array
    place: jax.Array


class Stored(NamedTuple):
    """What an entry of an array is of a quantised weight.

    Attributes:
        per_byte: its numbers, along the last axis.
        block_rows: its rows, of which this array has one number.
    """

    per_byte: int = 1
    block_rows: int = 1


def param(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    axes: Axes,
    *,
    in_stack: bool = False,
    taken_apart: bool = False,
    stored: Stored | None = None,
) -> nnx.Param[jax.Array]:
    """A named weight; only its shape matters, since models are built abstractly.

    Args:
        shape: of it, in one layer.
        dtype: of its values.
        axes: logical ones.
        in_stack: a layer gets it as `InStack`.
        taken_apart: no linear map by itself.
        stored: of a quantised weight, and of what its blocks have.
    """
    value = jnp.zeros(shape, dtype)
    return nnx.Param(value, logical_axes=axes, in_stack=in_stack, taken_apart=taken_apart, stored=stored)


class QuantizedParams(NamedTuple):
    """A weight, with what else it has if it is quantised; see `QuantizedMatrix`."""

    weight: nnx.Param[jax.Array]
    scale: nnx.Param[jax.Array] | None = None
    zero: nnx.Param[jax.Array] | None = None


def weight_params(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    axes: Axes,
    quantization: QuantizationConfig | None,
    *,
    in_stack: bool = False,
    taken_apart: bool = False,
) -> QuantizedParams:
    """A matrix, or several, and the numbers of its blocks if it is quantised; see `param`."""
    if quantization is None:
        return QuantizedParams(param(shape, dtype, axes, in_stack=in_stack, taken_apart=taken_apart))
    form = format_of(quantization)
    *lead, num_rows, num_columns = shape
    rows, columns = form.block
    blocks = (*lead, -(-num_rows // rows), -(-num_columns // columns) if columns else 1)
    block_axes = axes if columns else (*axes[:-1], None)
    of_blocks = partial(param, blocks, axes=block_axes, in_stack=in_stack, stored=Stored(block_rows=rows))
    scale_dtype = _SCALE_DTYPES.get(quantization.scale_dtype) or jnp.dtype(quantization.scale_dtype)
    entries, stored = (*lead, num_rows, num_columns // form.per_byte), Stored(per_byte=form.per_byte)
    return QuantizedParams(
        param(entries, form.dtype, axes, in_stack=in_stack, taken_apart=taken_apart, stored=stored),
        of_blocks(scale_dtype),
        of_blocks(jnp.dtype(jnp.uint8)) if quantization.zeros else None,
    )


def format_of(quantization: QuantizationConfig) -> QuantizedFormat:
    """What kernels know of it."""
    return QuantizedFormat(quantization.numbers, quantization.block)


class Linear(nnx.Module):
    """y = x W^T + b."""

    # Of the result; None for the activations'.
    out_dtype: ClassVar[DTypeLike | None] = None
    # Whether other maps are made of its weight, and it is not applied by itself.
    taken_apart: ClassVar[bool] = False

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        axes: Axes,
        bias: bool,
        dtype: jnp.dtype,
        quantization: QuantizationConfig | None = None,
    ) -> None:
        # A kernel reads a quantised weight where it is: cut out of the stack it would be copied.
        self.weight, self.scale, self.zero = weight_params(
            (out_size, in_size),
            dtype,
            axes,
            quantization,
            taken_apart=self.taken_apart,
            in_stack=quantization is not None,
        )
        self.bias = param((out_size,), dtype, axes[:1]) if bias else None
        self._axes = axes
        self._form = None if quantization is None else format_of(quantization)
        # Both are set while a step is traced.
        self.update: Update | None = None
        self.maths: LinearOps | None = None

    def __call__(self, x_TI: jax.Array) -> jax.Array:
        """[T, in] -> [T, out]."""
        if self.maths is None:
            y_TO = jnp.einsum("ti,oi->to", x_TI, self.matrix(x_TI.dtype), preferred_element_type=self.out_dtype)
        else:
            out_axis, in_axis = self._axes
            y_TO = multiply(self.maths, x_TI, *self._stacked(), (out_axis, in_axis))
        if self.bias is not None:
            y_TO = y_TO + self.bias[...].astype(y_TO.dtype)
        return y_TO if self.update is None else y_TO + self.update(x_TI).astype(y_TO.dtype)

    def matrix(self, dtype: jnp.dtype) -> jax.Array:
        """The weight in the activations' dtype, [out, in]."""
        if self._form is None:
            return self.weight[...]
        matrices, place = self._stacked()
        return matrices.matrix(place, dtype)

    def _stacked(self) -> tuple[Matrices, jax.Array]:
        """The quantised weights of all layers, and the place of this one's."""
        weight, scale, zero = (
            None if each is None else cast("InStack", each.get_value()) for each in (self.weight, self.scale, self.zero)
        )
        assert weight is not None
        assert scale is not None
        return Matrices(weight.stack, scale.stack, None if zero is None else zero.stack, self._form), weight.place


class RMSNorm(nnx.Module):
    """x / rms(x) * (weight + offset) over the last axis (arXiv:1910.07467), in f32."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype, offset: float = 0.0, axes: Axes = (None,)) -> None:
        self.weight = param((size,), dtype, axes)
        self._eps = eps
        self._offset = offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Any leading axes; returns x's dtype."""
        x32 = x.astype(jnp.float32)
        x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self._eps)
        return (x32 * (self.weight[...].astype(jnp.float32) + self._offset)).astype(x.dtype)


class Embedding(nnx.Module):
    """Token table; also the output head when tied."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: jnp.dtype) -> None:
        self.weight = param((vocab_size, hidden_size), dtype, ("vocab", "hidden"))

    def __call__(self, token_ids_T: jax.Array) -> jax.Array:
        """Ids must lie inside the vocabulary: a gather would clamp them silently."""
        return self.weight[...][token_ids_T]

    def logits(self, x_BD: jax.Array) -> jax.Array:
        """Scores over the vocabulary, f32."""
        return jnp.einsum("bd,vd->bv", x_BD, self.weight[...], preferred_element_type=jnp.float32)


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)): SwiGLU with silu, GeGLU with gelu (arXiv:2002.05202)."""

    same_inputs: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj")

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        dtype: jnp.dtype,
        activation: str = "silu",
        quantization: QuantizationConfig | None = None,
    ) -> None:
        make = partial(Linear, bias=bias, dtype=dtype, quantization=quantization)
        self.gate_proj = make(hidden_size, intermediate_size, axes=("mlp", "hidden"))
        self.up_proj = make(hidden_size, intermediate_size, axes=("mlp", "hidden"))
        self.down_proj = make(intermediate_size, hidden_size, axes=("hidden", "mlp"))
        self._activation = ACTIVATIONS[activation]

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """[T, D] -> [T, D]."""
        return self.down_proj(self._activation(self.gate_proj(x_TD)) * self.up_proj(x_TD))
