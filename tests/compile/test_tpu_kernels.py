"""TPU kernels that no step of the other tests has, compiled for each chip."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.parallel.mesh import mesh_of
from jaxserve.plan.targets import parse_target, prepare_environment, target_devices
from kernels_pallas.dispatch import choose_grouped_matmul
from kernels_pallas.grouped_matmul.api import ExpertShape, Matrices
from kernels_pallas.quantized import QuantizedFormat, QuantizedRows
from kernels_pallas.token_tiles import Blocks
from tests.support.marks import slow

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")

NUM_OUTPUTS, NUM_INPUTS, NUM_MATRICES, NUM_BLOCKS, BLOCK_ROWS = 768, 2048, 16, 8, 128


def _array(target: str) -> tuple[Any, Any]:
    """Return the mesh of one device of a target, and a function that makes its arrays."""
    prepare_environment(parse_target(target))
    mesh = mesh_of(target_devices(parse_target(target)), 1, 1)
    sharding = NamedSharding(mesh, PartitionSpec())

    def array(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    return mesh, array


@pytest.mark.parametrize("block", [(128, 128), slow((1, 0))])
@pytest.mark.parametrize("target", ["v6e:2x2", slow("v5p:2x2x1")])
def test_fp8_experts_of_f32_rows(target: str, block: tuple[int, int]) -> None:
    """The MXU does not take fp8 with f32."""
    mesh, array = _array(target)
    format = QuantizedFormat("fp8", block)
    choice = choose_grouped_matmul([ExpertShape(NUM_OUTPUTS, NUM_INPUTS, jnp.dtype(jnp.float32), format)], mesh)

    def multiply(x_PI: jax.Array, values: jax.Array, scale: jax.Array, blocks: Blocks) -> jax.Array:
        return choice.impl(x_PI, [Matrices(values, scale, format=format)], blocks)[0]

    values = array(NUM_MATRICES, NUM_OUTPUTS, NUM_INPUTS, dtype=format.dtype)
    scale = array(NUM_MATRICES, NUM_OUTPUTS // block[0], NUM_INPUTS // (block[1] or NUM_INPUTS), dtype=jnp.float32)
    rows = array(NUM_BLOCKS * 16, NUM_INPUTS, dtype=jnp.float32)
    compiled = jax.jit(multiply).lower(rows, values, scale, Blocks(array(NUM_BLOCKS), array(NUM_MATRICES))).compile()
    assert "grouped_matmul" in (compiled.as_text() or "")


@pytest.mark.parametrize(
    ("target", "format"),
    [
        ("tpu7x:2x2x1", QuantizedFormat("fp8", (128, 128))),
        slow("tpu7x:2x2x1", QuantizedFormat("fp8", (1, 0))),
        ("v6e:2x2", QuantizedFormat("int8", (1, 0))),
        slow("v5e:2x2", QuantizedFormat("int8", (1, 0))),
        slow("v5p:2x2x1", QuantizedFormat("int8", (1, 0))),
    ],
)
def test_experts_of_quantised_rows(target: str, format: QuantizedFormat) -> None:
    """Where a chip multiplies 8 bits faster, prompts reach the kernel so, and the elements are not converted."""
    mesh, array = _array(target)
    shape = ExpertShape(NUM_OUTPUTS, NUM_INPUTS, jnp.dtype(jnp.bfloat16), format)
    choice = choose_grouped_matmul([shape], mesh)
    assert choice.name == "tpu"
    assert choice.impl.takes_quantized_rows(format, NUM_INPUTS)

    rows, columns = format.block
    num_scales, num_rows = NUM_INPUTS // (columns or NUM_INPUTS), NUM_BLOCKS * BLOCK_ROWS
    x = QuantizedRows(array(num_rows, NUM_INPUTS, dtype=format.dtype), array(num_scales, num_rows, dtype=jnp.float32))
    values = array(NUM_MATRICES, NUM_OUTPUTS, NUM_INPUTS, dtype=format.dtype)
    scale = array(NUM_MATRICES, NUM_OUTPUTS // rows, num_scales, dtype=jnp.float32)

    def multiply(x: QuantizedRows, values: jax.Array, scale: jax.Array, blocks: Blocks) -> jax.Array:
        matrices = [Matrices(values, scale, format=format)]
        return choice.impl(x, matrices, blocks, out_dtype=jnp.bfloat16)[0]

    blocks = Blocks(array(NUM_BLOCKS), array(NUM_MATRICES))
    compiled = jax.jit(multiply).lower(x, values, scale, blocks).compile()
    assert "grouped_matmul" in (compiled.as_text() or "")
