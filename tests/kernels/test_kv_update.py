"""Updates of the KV cache write every slot that is named and nothing else, against a loop in numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.kv_update.xla.backend import write_tokens

PAGE_SIZE, PAGES, LAYERS = 16, 5, 2
needs_pallas = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")


def on_gpu(new_2TKH: jax.Array, pages_2PKSH: jax.Array, slot_T: jax.Array, first_page: jax.Array) -> Any:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels_pallas.kv_update.gpu.backend import kv_update

    params = plgpu.InterpretGPUParams(detect_races=True)
    return jnp.stack(kv_update(list(new_2TKH), list(pages_2PKSH), slot_T, first_page // PAGES, PAGES, params))


def on_xla(new_2TKH: jax.Array, pages_2PKSH: jax.Array, slot_T: jax.Array, first_page: jax.Array) -> Any:
    page_T = jnp.where(slot_T < PAGES * PAGE_SIZE, first_page + slot_T // PAGE_SIZE, LAYERS * PAGES)
    return jnp.stack(
        [write_tokens(p, page_T, slot_T % PAGE_SIZE, n) for p, n in zip(pages_2PKSH, new_2TKH, strict=True)]
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8])
@pytest.mark.parametrize("num_tokens", [1, 7, 24, 48])
# The second takes 192 or 384 bytes a token, of which 192 are no whole number of shared memory's 128.
@pytest.mark.parametrize("heads", [(2, 64), (3, 64)])
@pytest.mark.parametrize("update", [on_xla, pytest.param(on_gpu, marks=needs_pallas)])
def test_each_token_goes_to_its_slot(update: Any, heads: tuple[int, int], num_tokens: int, dtype: Any) -> None:
    """A third of the tokens are padding, with slots past the layer's last one; the other layer is unchanged."""
    rng = np.random.default_rng(num_tokens)
    slots = rng.permutation(PAGES * PAGE_SIZE)[:num_tokens]
    slots[2::3] = PAGES * PAGE_SIZE
    new = jnp.asarray(rng.integers(-100, 100, (2, num_tokens, *heads)), jnp.float32).astype(dtype)
    old = jnp.asarray(rng.integers(-100, 100, (2, LAYERS * PAGES, heads[0], PAGE_SIZE, heads[1])), jnp.float32).astype(
        dtype
    )
    want = np.asarray(old.astype(jnp.float32)).copy()
    for token, slot in enumerate(slots.tolist()):
        if slot < PAGES * PAGE_SIZE:
            want[:, PAGES + slot // PAGE_SIZE, :, slot % PAGE_SIZE] = np.asarray(new[:, token].astype(jnp.float32))
    got = jax.jit(update)(new, old, jnp.asarray(slots, jnp.int32), jnp.int32(PAGES))
    np.testing.assert_array_equal(np.asarray(got.astype(jnp.float32)), want)
