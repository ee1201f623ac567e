"""Brings the hosts of one engine together and hands them to JAX's distributed runtime."""

import logging
from collections.abc import Mapping
from typing import Any

import jax

from jaxserve.config import EngineConfig
from jaxserve.distributed.follower import Leader
from jaxserve.distributed.leader import Followers
from jaxserve.distributed.rendezvous import gather, hello, join

logger = logging.getLogger(__name__)


def meet_followers(config: EngineConfig, hf_config: Mapping[str, Any], shapes: Mapping[str, Any]) -> Followers:
    """On host 0: wait for the other hosts; call before JAX has touched a device.

    Raises:
        LaunchError: they do not come, or would not run the same step.
    """
    assert config.dist_init_addr is not None
    channels, coordinator = gather(hello(config, hf_config, shapes), config.dist_init_addr, config.dist_timeout_s)
    followers = Followers(channels)
    _start_runtime(config, coordinator)
    return followers


def meet_leader(config: EngineConfig, hf_config: Mapping[str, Any], shapes: Mapping[str, Any]) -> Leader:
    """On any other host: join host 0; call before JAX has touched a device.

    Raises:
        LaunchError: it cannot be reached, or refuses.
    """
    assert config.dist_init_addr is not None
    channel, coordinator = join(hello(config, hf_config, shapes), config.dist_init_addr, config.dist_timeout_s)
    leader = Leader(channel)
    _start_runtime(config, coordinator)
    return leader


def _start_runtime(config: EngineConfig, coordinator: str) -> None:
    jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=config.nnodes,
        process_id=config.node_rank,
        initialization_timeout=int(config.dist_timeout_s),
    )
    logger.info(
        "host %d of %d: %d of %d devices", config.node_rank, config.nnodes, jax.local_device_count(), jax.device_count()
    )
