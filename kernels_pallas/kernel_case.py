"""A call of a kernel whose result is known: what tests and `jaxserve.device_check` run on every implementation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One call.

    Attributes:
        run: the call, a pure function that can be jitted.
        arguments: its arguments, pytrees of arrays.
        verify: compares the result with a reference in float64; raises AssertionError with what differs.
    """

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    verify: Callable[[Any], None]
