"""Counting of collectives and kernels in the text of a compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.plan.hlo import Array, HloProgram, find_collectives

CALL = '  %%x = f32[8] custom-call(%%y), custom_call_target="%s", metadata={op_name="%s"}'


def program(*lines: str) -> str:
    return "\n".join(["ENTRY %main (y: f32[8]) -> f32[8] {", "  %y = f32[8] parameter(0)", *lines, "}"])


def compiled(*, loop: bool) -> str:
    """Compile two all-reduces per layer, in a loop of three layers or in one layer, followed by an all-gather."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))

    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            x = lax.psum(jnp.sin(x) @ w, "model")
            return lax.psum(jnp.cos(x) @ w, "model"), None

        x = lax.scan(layer, x, w)[0] if loop else layer(x, w[0])[0]
        return lax.all_gather(x, "model")

    mapped = jax.shard_map(layers, mesh=mesh, in_specs=(P(), P(None)), out_specs=P(), check_vma=False)
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P())) for shape in ((8, 8), (3, 8, 8))
    ]
    return jax.jit(mapped).lower(*arrays).compile().as_text() or ""


def test_collectives_of_a_loop_count_for_each_layer() -> None:
    found = find_collectives(HloProgram(compiled(loop=True)))
    assert found == ({"all-reduce": 2}, {"all-gather": 1}, {"all-reduce": 6, "all-gather": 1})


def test_collectives_outside_of_loops() -> None:
    found = find_collectives(HloProgram(compiled(loop=False)))
    assert found[:2] == ({}, {"all-reduce": 2, "all-gather": 1})


@pytest.mark.parametrize(
    ("lines", "kernels"),
    [
        ([CALL % ("tpu_custom_call", "jit(f)/while/body/paged_decode/pallas_call")], ["paged_decode"]),
        ([CALL % ("mosaic_gpu_v2", "jit(f)/kv_update/mpmd_map")] * 2, ["kv_update"]),
        ([CALL % ("TopK", "jit(f)/top_k")], []),
    ],
)
def test_kernels(lines: list[str], kernels: list[str]) -> None:
    assert HloProgram(program(*lines)).kernels == kernels


@pytest.mark.parametrize(
    ("layout", "num_bytes"),
    [
        ("", 3 * 96 * 2),
        ("1,0", 3 * 96 * 2),
        # TPU: tiles of 8 rows and 128 lanes, two rows of 16 bits in one word.
        ("1,0:T(8,128)(2,1)", 8 * 128 * 2),
        # The minor axis is the one of 3.
        ("0,1:T(8,128)(2,1)", 96 * 128 * 2),
    ],
)
def test_bytes_with_the_padding_of_tiles(layout: str, num_bytes: int) -> None:
    assert Array("bf16", (3, 96), layout).num_bytes == num_bytes


def test_memory_of_the_core_is_not_device_memory() -> None:
    assert not Array("bf16", (8, 128), "1,0:T(8,128)(2,1)S(1)").in_device_memory
    assert Array("bf16", (8, 128), "1,0:T(8,128)(2,1)").in_device_memory
