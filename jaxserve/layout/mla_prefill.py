"""How large the room is that prompts of latent attention are expanded in, if there is one."""

import dataclasses
import logging
from functools import partial

from jax.sharding import Mesh

from jaxserve.config import ModelConfig, SchedulerConfig
from jaxserve.layers.mla_prefill import MlaPrefillWorkspace
from kernels_pallas.dispatch import ChosenAttention, choose_attention
from kernels_pallas.paged_attention.common.head_shards import cache_bytes

logger = logging.getLogger(__name__)

# The kernels know sizes of whole tiles.
_KERNEL_TILE = 128
# Measured on CPU (scripts/bench/results). For accelerators reasoned: 2 KB are written and read for 262,144 FLOP, with
# which a key of a head takes 2.3 times as long on v5p, 2.8 on H100 and 5.4 on v6e.
_CPU_EXPANSION_COST, _KERNEL_EXPANSION_COST = 2.0, 4.0


def layout_workspace(
    model: ModelConfig, chosen: ChosenAttention, mesh: Mesh, scheduler: SchedulerConfig, max_bytes: int
) -> MlaPrefillWorkspace | None:
    """The room of a model, if it has latent attention and its steps can be cheaper so.

    Deterministic mode has none: what else runs in a step decides which way is the cheaper one.

    Args:
        model: on the mesh.
        chosen: the backend of the cache.
        mesh: of the devices.
        scheduler: limits of a step.
        max_bytes: of the room, on each device.
    """
    cached = chosen.backend.config
    if model.latent is None or model.windows != (None,) or cached.batch_invariant:
        return None
    by_kernel = chosen.name != "xla"
    numbers = max(model.latent.key_dim + model.latent.rope_dim, model.latent.value_dim)
    config = dataclasses.replace(
        cached,
        num_layers=1,
        num_kv_heads=cached.num_q_heads,
        head_dim=-(-numbers // _KERNEL_TILE) * _KERNEL_TILE if by_kernel else numbers,
        num_pages=1,
        dtype=cached.compute_dtype,
        value_dim=None,
        # No rows of single tokens come here, so kernels for those are left out.
        batch_invariant=by_kernel,
    )
    choose = partial(choose_attention, chosen.name, mesh=mesh)
    # One prompt of full length, and others that begin in the same step.
    most_tokens = scheduler.context_length + scheduler.max_step_tokens
    try:
        page_bytes = cache_bytes(choose(config).backend, mesh)
        num_pages = min(-(-most_tokens // cached.page_size), max_bytes // page_bytes)
        backend = choose(dataclasses.replace(config, num_pages=max(1, num_pages))).backend
    except NotImplementedError as error:
        logger.warning("prompts are attended over as they are cached: %s", error)
        return None
    cost = _KERNEL_EXPANSION_COST if by_kernel else _CPU_EXPANSION_COST
    room = MlaPrefillWorkspace(latent=model.latent, backend=backend, expansion_cost=cost, mesh=mesh)
    if not room.can_pay(scheduler.max_step_tokens):
        logger.info("prompts: always over what is cached: %d expanded tokens would never pay", room.num_tokens)
        return None
    megabytes = cache_bytes(backend, mesh) / 1e6
    logger.info("prompts: where cheaper over expanded keys, %d tokens in %.0f MB a device", room.num_tokens, megabytes)
    return room
