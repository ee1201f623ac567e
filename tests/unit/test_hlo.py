"""Counting of collectives and kernels in the text of a compiled program."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.plan.hlo import Collectives, find_collectives, num_kernels


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
    found = find_collectives(compiled(loop=True))
    assert found == Collectives({"all-reduce": 2}, {"all-gather": 1})
    assert found.per_step(Fraction(3)) == {"all-reduce": 6, "all-gather": 1}
    # A body of six layers runs four times and a body of one layer twice: 26 layers, of which the bodies hold seven.
    assert Collectives({"all-reduce": 14}, {}).per_step(Fraction(26, 7)) == {"all-reduce": 52}


def test_collectives_outside_of_loops() -> None:
    assert find_collectives(compiled(loop=False)) == Collectives({}, {"all-reduce": 2, "all-gather": 1})


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('  %x = f32[8] custom-call(%y), custom_call_target="tpu_custom_call"\n', 1),
        ('  %x = f32[8] custom-call(%y), custom_call_target="mosaic_gpu_v2"\n' * 2, 2),
        ('  %x = f32[8] custom-call(%y), custom_call_target="TopK"\n', 0),
    ],
)
def test_kernels(text: str, count: int) -> None:
    assert num_kernels(text) == count
