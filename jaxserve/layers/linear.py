"""Flax NNX building blocks, which define the parameter tree, its logical axes and the plain computation.

Weights keep Hugging Face's orientation, [out, in]: nothing is transposed while loading, and XLA on CPU is faster with
it. Products accumulate in f32 and return the activations' dtype.

Logical axes: `vocab`, `hidden`, `heads` (query heads x head dim), `kv_heads`, `mlp`, `experts`,
`experts_shared`, `expert_mlp`, `layers`; None is replicated.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.config import QuantizationConfig
from jaxserve.layers.context import LayerContext, Path
from jaxserve.layers.linear_kernel import StackedMatrix, can_add_bias, multiply
from kernels_pallas.grouped_matmul.api import Matrices
from kernels_pallas.quantized import QuantizedFormat
from kernels_pallas.stacked import Stacked

Axes: TypeAlias = tuple[str | None, ...]
# Scale dtypes that JAX names differently from a model's config.
_SCALE_DTYPES: Mapping[str, jnp.dtype] = {"e8m0": jnp.dtype(jnp.uint8)}
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class Packing(NamedTuple):
    """The mapping from array entries to elements of a quantised weight.

    Attributes:
        per_byte: elements in one entry, along the last axis.
        block_rows: rows of the weight that share one entry.
    """

    per_byte: int = 1
    block_rows: int = 1


class ParamOptions(NamedTuple):
    """How a parameter is stored and used.

    Attributes:
        keep_stacked: layers receive the weight as `Stacked` instead of a slice.
        absorbed_only: the weight is folded into other ops and never applied directly.
        packing: packing of a quantised weight or of its scales or zero points.
        stored: format of the checkpoint's weight if it is quantised and this one is not.
        loaded: the weight is loaded from the checkpoint.
    """

    keep_stacked: bool = False
    absorbed_only: bool = False
    packing: Packing | None = None
    stored: QuantizationConfig | None = None
    loaded: bool = True


def param(
    shape: tuple[int, ...], dtype: jnp.dtype, axes: Axes, options: ParamOptions | None = None
) -> nnx.Param[jax.Array]:
    """Create a parameter. Its values are zeros: models are built abstractly, so only shapes matter.

    Args:
        shape: shape of the weight in one layer.
        dtype: dtype of its values.
        axes: logical axes.
        options: how it is stored and used.
    """
    return nnx.Param(jnp.zeros(shape, dtype), logical_axes=axes, **(options or ParamOptions())._asdict())


class QuantizedParam(NamedTuple):
    """A weight, with its scales and zero points if it is quantised; see `QuantizedMatrix`."""

    weight: nnx.Param[jax.Array]
    scale: nnx.Param[jax.Array] | None = None
    zero: nnx.Param[jax.Array] | None = None


def weight_params(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    axes: Axes,
    quantization: QuantizationConfig | None,
    options: ParamOptions | None = None,
) -> QuantizedParam:
    """Create one or several matrices, with scales and zero points if they are quantised; see `param`."""
    options = options or ParamOptions()
    if quantization is None:
        return QuantizedParam(param(shape, dtype, axes, options))
    format = format_of(quantization)
    *lead, num_rows, num_columns = shape
    rows, columns = format.block
    blocks = (*lead, -(-num_rows // rows), -(-num_columns // columns) if columns else 1)
    block_axes = axes if columns else (*axes[:-1], None)
    block_options = ParamOptions(keep_stacked=options.keep_stacked, packing=Packing(block_rows=rows))
    scale_dtype = _SCALE_DTYPES.get(quantization.scale_dtype) or jnp.dtype(quantization.scale_dtype)
    entries, packing = (*lead, num_rows, num_columns // format.per_byte), Packing(per_byte=format.per_byte)
    return QuantizedParam(
        param(entries, format.dtype, axes, options._replace(packing=packing)),
        param(blocks, scale_dtype, block_axes, block_options),
        param(blocks, jnp.dtype(jnp.uint8), block_axes, block_options) if quantization.zeros else None,
    )


def format_of(quantization: QuantizationConfig) -> QuantizedFormat:
    """Return the format as kernels take it."""
    return QuantizedFormat(quantization.element_type, quantization.block)


class Linear(nnx.Module):
    """y = x W^T + b.

    Attributes:
        path: path of the module in the model's tree; the decoder sets it once, when the model is built.
    """

    # Dtype of the result; None for the activations' dtype.
    out_dtype: ClassVar[DTypeLike | None] = None
    # Whether the weight is folded into other ops and never applied directly.
    absorbed_only: ClassVar[bool] = False
    # Whether a quantised weight is dequantised when it is loaded, because no kernel multiplies by it.
    dequantized: ClassVar[bool] = False

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
        stored = None
        if self.dequantized:
            stored, quantization = quantization, None
        # A kernel reads the weight in the stack of all layers; slicing it out would copy it.
        options = ParamOptions(keep_stacked=True, absorbed_only=self.absorbed_only, stored=stored)
        self.weight, self.scale, self.zero = weight_params((out_size, in_size), dtype, axes, quantization, options)
        self.bias = param((out_size,), dtype, axes[:1], ParamOptions(keep_stacked=True)) if bias else None
        self.path: Path = ()
        self._axes: tuple[str | None, str | None] = (axes[0], axes[1])
        self._format = None if quantization is None else format_of(quantization)

    def __call__(self, x_TI: jax.Array, ctx: LayerContext) -> jax.Array:
        """[T, in] -> [T, out]."""
        (y_TO,) = apply_group((self,), x_TI, ctx)
        return y_TO

    def by_xla(self, x_TI: jax.Array) -> jax.Array:
        """Return the result without a kernel and without adapters."""
        w_OI = self.matrix(x_TI.dtype)
        return self.add_bias(jnp.einsum("ti,oi->to", x_TI, w_OI, preferred_element_type=self.out_dtype))

    def add_bias(self, y_TO: jax.Array) -> jax.Array:
        """Add the bias, if there is one."""
        if self.bias is None:
            return y_TO
        bias_O = cast("Stacked", self.bias.get_value()).slice()
        # In f32, which rounds alike: XLA would fuse a sum in bf16 into cuBLAS's call, and copy the weight to do so.
        return (y_TO.astype(jnp.float32) + bias_O.astype(jnp.float32)).astype(y_TO.dtype)

    def with_bias(self, matrix: StackedMatrix) -> StackedMatrix:
        """Return the weight with the bias."""
        bias_LO = None if self.bias is None else cast("Stacked", self.bias.get_value()).stack
        return matrix._replace(matrices=matrix.matrices._replace(bias_XO=bias_LO))

    def matrix(self, dtype: jnp.dtype) -> jax.Array:
        """Return the weight, [out, in]; a quantised weight is dequantised to `dtype`."""
        if self._format is None:
            return cast("Stacked", self.weight.get_value()).slice()
        matrices, layer, _ = self.stacked()
        return matrices.matrix(layer, dtype)

    def uses_stack(self, ctx: LayerContext, num_tokens: int) -> bool:
        """Return whether the weight is multiplied where it is in its stack; see `LinearOps`."""
        return ctx.ops.linear.uses_stack(self.path, quantized=self._format is not None, num_tokens=num_tokens)

    def stacked(self) -> StackedMatrix:
        """Return the weights of all layers and the index of this layer among them."""
        weight, scale, zero = (
            None if each is None else cast("Stacked", each.get_value()) for each in (self.weight, self.scale, self.zero)
        )
        assert weight is not None  # for the type checker
        scales, zeros = (None if each is None else each.stack for each in (scale, zero))
        return StackedMatrix(Matrices(weight.stack, scales, zeros, self._format), weight.layer, self._axes)


def apply_group(linears: Sequence[Linear], x_TI: jax.Array, ctx: LayerContext) -> list[jax.Array]:
    """Apply linear modules to the same activations; they share the kernel's call, and the product with A matrices."""
    by_kernel = [linear for linear in linears if linear.uses_stack(ctx, x_TI.shape[0])]
    results: dict[Path, jax.Array] = {}
    if by_kernel:
        group = [linear.stacked() for linear in by_kernel]
        adds_bias = can_add_bias(ctx.ops.linear, group[0], x_TI.shape[0])
        if adds_bias:
            group = [linear.with_bias(matrix) for linear, matrix in zip(by_kernel, group, strict=True)]
        products = multiply(ctx.ops.linear, x_TI, group, linears[0].out_dtype)
        for linear, y_TO in zip(by_kernel, products, strict=True):
            results[linear.path] = y_TO if adds_bias else linear.add_bias(y_TO)
    for linear in linears:
        if linear.path not in results:
            results[linear.path] = linear.by_xla(x_TI)
    lora = ctx.lora.group([linear.path for linear in linears])
    return [
        _with_update(results[linear.path], None if lora is None else lora.update(linear.path, x_TI))
        for linear in linears
    ]


def _with_update(y_TO: jax.Array, update_TO: jax.Array | None) -> jax.Array:
    return y_TO if update_TO is None else y_TO + update_TO.astype(y_TO.dtype)


class Embedding(nnx.Module):
    """Token embedding; also the output head if the weights are tied."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: jnp.dtype) -> None:
        self.weight = param((vocab_size, hidden_size), dtype, ("vocab", "hidden"))

    def __call__(self, token_ids_T: jax.Array) -> jax.Array:
        """Look up token ids, which must be inside the vocabulary: a gather would clamp them silently."""
        return self.weight[...][token_ids_T]

    def logits(self, x_BD: jax.Array) -> jax.Array:
        """Return logits over the vocabulary, f32."""
        return jnp.einsum("bd,vd->bv", x_BD, self.weight[...], preferred_element_type=jnp.float32)


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)): SwiGLU with silu, GeGLU with gelu (arXiv:2002.05202)."""

    lora_groups: ClassVar[tuple[tuple[str, ...], ...]] = (("gate_proj", "up_proj"),)

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

    def __call__(self, x_TD: jax.Array, ctx: LayerContext) -> jax.Array:
        """[T, D] -> [T, D]."""
        gate_TF, up_TF = apply_group((self.gate_proj, self.up_proj), x_TD, ctx)
        return self.down_proj(self._activation(gate_TF) * up_TF, ctx)
