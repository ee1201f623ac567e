"""MLA prefill in the MHA form, with every attention backend, against the absorbed form in numpy in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.layers.mla import KvBProj
from jaxserve.layers.mla_prefill import MlaPrefillWorkspace
from jaxserve.models.registry import find_architecture
from jaxserve.parallel.mesh import make_mesh
from kernels_pallas.paged_attention.api import AttentionConfig
from kernels_pallas.paged_attention.cases import LAYER, Case, Step, expected, make_step
from kernels_pallas.paged_attention.common import page_moves
from kernels_pallas.stacked import Stacked
from tests.compile.models import DEEPSEEK_V31
from tests.kernels.test_paged_attention import BF16, F32, implementation
from tests.support.kernels import needs_pallas

# The GPU kernels support no other size of latent vectors.
MLA = find_architecture(DEEPSEEK_V31).model_config(DEEPSEEK_V31).mla
assert MLA is not None
# Rows that run a single token, the first chunk of a prompt and a later one, and padding rows and tokens.
CASE = Case(q_lens=(1, 1, 5, 30), kv_lens=(16, 77, 5, 90), heads=(4, 1, 576), value_dim=512, num_tokens=64)


class Projections:
    """The part of a layer's projections that the workspace uses."""

    cache_scales = None

    def __init__(self, dtype: jnp.dtype) -> None:
        self.kv_b_proj = KvBProj(MLA, CASE.heads[0], dtype=dtype)
        values = np.random.default_rng(1).standard_normal(self.kv_b_proj.weight.shape) * MLA.kv_lora_rank**-0.5
        self.kv_b_proj.weight = nnx.Param(Stacked(jnp.asarray(values, dtype)[None], jnp.int32(0)))

    def sinks_N(self) -> None:
        """Return None: there are no attention sinks."""


def make_workspace(name: str, cached: AttentionConfig, num_pages: int) -> MlaPrefillWorkspace:
    """Return a workspace of `num_pages` pages."""
    heads = dataclasses.replace(
        cached,
        num_layers=1,
        num_kv_heads=cached.num_q_heads,
        head_dim=256,
        num_pages=num_pages,
        value_dim=None,
        batch_invariant=name != "xla",
    )
    backend = implementation(name, heads, 1)
    return MlaPrefillWorkspace(mla=MLA, backend=backend, write_cost=1, mesh=make_mesh(1))


def absorbed_exactly(step: Step, q_TNQ: np.ndarray, keys_NHC: np.ndarray) -> Step:
    """Return the step with queries in the latent space of the cache, as in the absorbed form."""
    q_TNC = np.einsum("tnh,nhc->tnc", q_TNQ[..., : MLA.qk_nope_head_dim], keys_NHC)
    return step._replace(q_TNH=np.concatenate([q_TNC, q_TNQ[..., MLA.qk_nope_head_dim :]], axis=-1))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("xla", F32), *(pytest.param(one, BF16, marks=needs_pallas) for one in ("tpu", "gpu"))],
)
def test_matches_numpy(name: str, dtype: jnp.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three pages are moved at a time: seven pages take three turns, the last of which starts earlier and overlaps.
    monkeypatch.setattr(page_moves, "_TOKENS_AT_ONCE", 3 * CASE.page_size)
    config = CASE.config(dtype)
    step = make_step(CASE, config)
    projections = Projections(dtype)
    cached = implementation(name, config, 1)
    # One page more than the prompts occupy.
    workspace = make_workspace(name, config, 1 + 6 + 1)
    numbers = (*step.q_TNH.shape[:2], MLA.qk_nope_head_dim + MLA.qk_rope_head_dim)
    q_TNQ = jnp.asarray(np.random.default_rng(2).standard_normal(numbers), dtype)

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, cache: Any, meta: Any) -> Any:
        prompts = workspace.plan(cached, meta)
        return prompts.attend(projections, q, k, k[..., : MLA.kv_lora_rank], cache, jnp.int32(LAYER))

    old = cached.pack(*(jnp.moveaxis(jnp.asarray(pages_PSKH), 2, 1) for pages_PSKH in (step.k_PSKH, step.v_PSKH)))
    out, new = attend(q_TNQ, jnp.asarray(step.k_TKH, dtype), old, step.meta)

    keys_NHC, values_NVC = (np.asarray(each, np.float64) for each in projections.kv_b_proj.by_head(dtype))
    want_TNC, pages_PSKH, _ = expected(
        CASE, config, absorbed_exactly(step, np.asarray(q_TNQ.astype(F32), np.float64), keys_NHC)
    )
    want_TNV = np.einsum("tnc,nvc->tnv", want_TNC, values_NVC)
    got_TNV = np.asarray(out.astype(F32))[: want_TNV.shape[0]]
    # One rounding each of queries, keys, weights and values, and sums over the latent vector's channels.
    tolerance = 4 * float(jnp.finfo(dtype).eps) + MLA.kv_lora_rank**0.5 * float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(got_TNV, want_TNV, rtol=0, atol=tolerance * np.abs(want_TNV).max())
    new_PSKH = np.asarray(jnp.moveaxis(cached.unpack(new)[0], 1, 2).astype(F32))
    held = ~np.isnan(pages_PSKH)
    np.testing.assert_array_equal(new_PSKH[held], pages_PSKH[held])
