"""Experts get the tokens of the step, and nothing of its padding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.layers.args import DecoderArgs
from jaxserve.layers.context import ExpertOps, LayerContext, LayerOps, LinearOps, NoLora
from jaxserve.layers.moe import MoE, router_config
from jaxserve.models.registry import find_architecture
from jaxserve.parallel.mesh import make_mesh
from kernels_pallas.grouped_matmul.xla.backend import XlaGroupedMatmul
from kernels_pallas.routing.xla.backend import XlaRouter
from kernels_pallas.stacked import Stacked
from tests.support.tiny import CONFIG

EXPERTS, TOP_K, TOKENS = 6, 2, 8
MOE = CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K, "moe_intermediate_size": 16, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "hidden_act": "silu", "attention_bias": False, "head_dim": 8,
}  # fmt: skip


class CountedMatmul(XlaGroupedMatmul):
    """A grouped matmul with blocks of one row, which keeps the number of blocks that it multiplies."""

    def __init__(self) -> None:
        self.num_live: list[int] = []

    def block_rows(self, num_rows: int, num_groups: int, row_bytes: int) -> int:
        del num_rows, num_groups, row_bytes
        return 1

    def __call__(self, x_PI: jax.Array, matrices: Any, blocks: Any, **options: Any) -> list[jax.Array]:
        jax.debug.callback(lambda live: self.num_live.append(int(live)), blocks.num_live)
        return super().__call__(x_PI, matrices, blocks, **options)


def run(live: int) -> tuple[np.ndarray, list[int]]:
    """Return the outputs for the same tokens, of which only the first are live, and the numbers of blocks."""
    config = find_architecture(MOE).model_config(MOE)
    graph, state = nnx.split(nnx.eval_shape(lambda: MoE(DecoderArgs(config, jnp.dtype("float32")))))
    rng = np.random.default_rng(0)

    def weight(leaf: jax.ShapeDtypeStruct) -> Stacked:
        values = jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
        return Stacked(values[None], jnp.int32(0))

    moe = nnx.merge(graph, jax.tree.map(weight, state))
    x_TD = jnp.asarray(rng.standard_normal((TOKENS, config.hidden_size)), jnp.float32)
    mesh, matmul = make_mesh(1), CountedMatmul()
    linear = LinearOps(matmul, mesh, ())
    assert config.moe is not None
    experts = ExpertOps(matmul, mesh, XlaRouter(router_config(config.moe)))
    ctx = LayerContext(LayerOps(linear, experts), NoLora(), jnp.arange(TOKENS) < live)
    out = np.asarray(jax.jit(lambda x_TD: moe(x_TD, ctx))(x_TD))
    jax.effects_barrier()
    return out, matmul.num_live


@pytest.mark.parametrize("live", [0, 1, 5, TOKENS])
def test_padding_reads_no_expert(live: int) -> None:
    out, num_live = run(live)
    whole, _ = run(TOKENS)
    # Once for gate and up, and once for down.
    assert num_live == [TOP_K * live] * 2
    np.testing.assert_array_equal(out[:live], whole[:live])
    assert not out[live:].any()
