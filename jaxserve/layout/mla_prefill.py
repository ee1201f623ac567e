"""Sizes the workspace of MLA prompts if their MHA form can be cheaper; see `jaxserve.layers.mla_prefill`."""

import dataclasses
import logging
from functools import partial

from jax.sharding import Mesh

from jaxserve.config import ModelConfig, SchedulerConfig
from jaxserve.layers.mla_prefill import MlaPrefillWorkspace
from kernels_pallas.dispatch import Choice, choose_attention
from kernels_pallas.paged_attention.api import AttentionBackend
from kernels_pallas.paged_attention.common.head_shards import cache_bytes

logger = logging.getLogger(__name__)

# The kernels need head dims that are a multiple of this.
_KERNEL_TILE = 128
# See `MlaPrefillWorkspace.write_cost`. Measured on CPU (scripts/bench/results). For accelerators it is estimated from
# bandwidth: 2 KB are written and read per 262,144 FLOPs, so a head's key takes 2.3 times as long as its FLOPs on v5p,
# 2.8 times on H100 and 5.4 times on v6e.
_CPU_WRITE_COST, _KERNEL_WRITE_COST = 2.0, 4.0


def layout_workspace(
    model: ModelConfig, chosen: Choice[AttentionBackend], mesh: Mesh, scheduler: SchedulerConfig, max_bytes: int
) -> MlaPrefillWorkspace | None:
    """Return the workspace of a model, or None if it has no MLA or no step is cheaper in the MHA form.

    In deterministic mode the result is None: the cheaper form would depend on what else runs in a step.

    Args:
        model: the model.
        chosen: the attention backend of the cache.
        mesh: the devices.
        scheduler: limits of a step.
        max_bytes: maximum size of the workspace on each device.
    """
    cached = chosen.impl.config
    if model.mla is None or model.windows != (None,) or cached.batch_invariant:
        return None
    by_kernel = chosen.name != "xla"
    channels = max(model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim, model.mla.v_head_dim)
    config = dataclasses.replace(
        cached,
        num_layers=1,
        num_kv_heads=cached.num_q_heads,
        head_dim=-(-channels // _KERNEL_TILE) * _KERNEL_TILE if by_kernel else channels,
        num_pages=1,
        dtype=cached.compute_dtype,
        value_dim=None,
        # Single-token rows never use the workspace, so decode kernels are left out.
        batch_invariant=by_kernel,
    )
    choose = partial(choose_attention, chosen.name, mesh=mesh)
    # One prompt of full length, and others that start in the same step.
    max_tokens = scheduler.context_length + scheduler.max_step_tokens
    try:
        page_bytes = cache_bytes(choose(config).impl, mesh)
        num_pages = min(-(-max_tokens // cached.page_size), max_bytes // page_bytes)
        backend = choose(dataclasses.replace(config, num_pages=max(1, num_pages))).impl
    except NotImplementedError as error:
        logger.warning("MLA prompts always take the absorbed form: %s", error)
        return None
    cost = _KERNEL_WRITE_COST if by_kernel else _CPU_WRITE_COST
    workspace = MlaPrefillWorkspace(mla=model.mla, backend=backend, write_cost=cost, mesh=mesh)
    if not workspace.can_be_cheaper(scheduler.max_step_tokens):
        logger.info(
            "MLA prompts always take the absorbed form: the MHA form would never pay with a workspace of %d tokens",
            workspace.num_tokens,
        )
        return None
    logger.info(
        "MLA prompts take the MHA form where it is cheaper: a workspace of %d tokens, %.0f MB on each device",
        workspace.num_tokens,
        cache_bytes(backend, mesh) / 1e6,
    )
    return workspace
