"""Ends the process when another host is lost."""

import logging
import os
from collections.abc import Callable
from typing import TypeAlias

from jaxserve.errors import ExitCode

logger = logging.getLogger(__name__)

# Called with the reason; does not return, except in tests.
GiveUp: TypeAlias = Callable[[str], None]


def end_process(reason: str) -> None:
    """End the process: a step in flight waits for the lost host forever and cannot be interrupted."""
    logger.error("%s: terminating the engine", reason)
    logging.shutdown()
    os._exit(int(ExitCode.ENGINE_LOST))
