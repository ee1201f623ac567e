"""Connects the hosts of one engine and starts JAX's distributed runtime on them."""

import logging

import jax

from jaxserve.config import EngineConfig
from jaxserve.distributed.follower import Leader
from jaxserve.distributed.leader import Followers
from jaxserve.distributed.rendezvous import gather, hello, join

logger = logging.getLogger(__name__)


def accept_followers(config: EngineConfig, model: str) -> Followers:
    """On host 0: wait for the other hosts; call before JAX has touched a device.

    Raises:
        LaunchError: a host does not join in time, or would not run the same step.
    """
    assert config.dist_init_addr is not None
    followers = Followers(gather(hello(config, model), config.dist_init_addr, config.dist_timeout_s))
    _start_runtime(config, config.dist_init_addr)
    return followers


def join_leader(config: EngineConfig, model: str) -> Leader:
    """On any other host: join host 0; call before JAX has touched a device.

    Raises:
        LaunchError: host 0 cannot be reached, or refuses this host.
    """
    assert config.dist_init_addr is not None
    leader = Leader(join(hello(config, model), config.dist_init_addr, config.dist_timeout_s))
    _start_runtime(config, config.dist_init_addr)
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
